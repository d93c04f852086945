"""Mixture of experts: a router, and feed-forward layers of which each token uses a few."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core.choices import check_fields
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.core.grouped import grouped_dot
from llmjax.nn.mlp import GATED, Mlp, activate
from llmjax.nn.param import constant, fan_in, param
from llmjax.nn.router import hashed, route
from llmjax.nn.variant import FeedForward
from llmjax.parallel.expert import by_expert

ROUTERS = ("softmax", "sigmoid", "expert_choice", "hash")
DROPS = ("last", "lightest")


@dataclasses.dataclass(frozen=True)
class MoeConfig(FeedForward):
  """Feed-forward layers of experts.

  Attributes:
    experts: how many (e); 0 means dense layers.
    top_k: experts a token goes to; of expert_choice, on average.
    width: feed-forward width of an expert; 0 means `mlp_width`.
    shared: experts that all tokens go to, as one layer of this many times `width`.
    first_k_dense: first layers that are dense, `mlp_width` wide.
    router: softmax, sigmoid, expert_choice (experts choose tokens, later ones too), hash (of ids).
    renormalize: weights of the chosen experts sum to 1, rather than to their share of all.
    scale: factor on the weights.
    groups: groups of consecutive experts, of which a token may use `top_groups`.
    noisy: learned noise on the scores in training.
    bias: scores get a bias where experts are chosen, moved towards even load (`optim.bias_rate`).
    capacity: most tokens of a row that an expert takes, as a multiple of its even share of them,
      padding not counted; 0: all. A token's experts then depend on its entire row; with top_k 1 and
      drop=last, on earlier tokens and on the number of tokens.
    drop: over capacity, drops the last tokens of a row (second choices first), or the lightest.
  """

  experts: int = 0
  top_k: int = 2
  width: int = 0
  shared: int = 0
  first_k_dense: int = 0
  router: str = "softmax"
  renormalize: bool = True
  scale: float = 1.0
  groups: int = 1
  top_groups: int = 1
  noisy: bool = False
  bias: bool = False
  capacity: float = 0.0
  drop: str = "last"
  name = "moe"  # no field

  def __post_init__(self):
    check_fields(
      "model.moe", self, router=ROUTERS, drop=DROPS, experts=0, top_k=1, width=0, shared=0,
      first_k_dense=0, groups=1, top_groups=1, capacity=0, scale="positive",
    )
    fields = dataclasses.fields(self)
    changed = [field.name for field in fields if getattr(self, field.name) != field.default]
    if not self.experts:
      if changed:
        raise UserError(f"model.moe.{changed[0]} changes nothing without model.moe.experts")
      return
    if self.experts % self.groups:
      raise UserError(f"model.moe.experts {self.experts} is not a multiple of groups {self.groups}")
    if self.top_groups > self.groups:
      raise UserError(f"model.moe.top_groups {self.top_groups} of {self.groups} groups")
    if self.top_k > self.experts // self.groups * self.top_groups:
      raise UserError(
        f"model.moe.top_k {self.top_k} is more than the "
        f"{self.experts // self.groups * self.top_groups} experts a token may use"
      )
    if self.router in ("expert_choice", "hash"):
      for key in ("bias", "noisy", "groups", "renormalize", "drop"):
        if key in changed:
          raise UserError(f"model.moe.{key} changes nothing with router={self.router}")
    if "drop" in changed and not self.capacity:
      raise UserError("model.moe.drop changes nothing without model.moe.capacity")

  @property
  def used(self) -> bool:
    return self.experts > 0

  def layer(self, key, model, out_scale: float) -> nnx.Module:
    return Moe(key, model.dims, self, model.activation, out_scale)

  def run(self, layer, x_btd, tokens_bt=None, real_bt=None, key=None) -> tuple:
    return layer(x_btd, tokens_bt, real_bt, key)

  def check(self, model):
    if model.kind not in ("decoder", "encoder"):
      raise UserError(f"model.kind={model.kind} has no experts: set model.moe.experts to 0")
    if self.first_k_dense >= model.layers:
      raise UserError(
        f"model.moe.first_k_dense {self.first_k_dense} leaves none of {model.layers} layers"
      )
    if model.mlp_bias:
      raise UserError("experts have no biases: leave model.mlp_bias")

  def slots(self, length):
    """Most tokens that an expert takes of rows of `length` (an int or several); 0: any number."""
    factor = self.capacity or (1.0 if self.router == "expert_choice" else 0.0)
    return np.minimum(length, np.ceil(factor * length * self.top_k / self.experts)).astype(int)

  def slots_of(self, real_bt):
    """The same by the number of each row's real tokens: slots_b."""
    return jnp.asarray(self.slots(np.arange(real_bt.shape[1] + 1)))[real_bt.sum(1)]


class Moe(nnx.Module):
  """Sums the results of a token's experts and of the shared ones; arguments as of `Mlp`.

  Source: Shazeer et al. 2017, arXiv:1701.06538; shared and narrow experts: Dai et al. 2024,
    arXiv:2401.06066, sec. 3.
  """

  fp32 = ("router_de", "noise_de")  # scores are computed in fp32

  def __init__(self, key, dims, config: MoeConfig, activation: str, out_scale: float):
    dims = dims | {"e": config.experts, "f": config.width or dims["f"]}
    self.config = config
    self.activation = activation
    if config.router != "hash":
      param(self, key, "router_de", dims, fan_in(dims, "d"))
    if config.bias:
      param(self, key, "bias_e", dims, constant(0.0), "router_bias")
    if config.noisy:
      param(self, key, "noise_de", dims, constant(0.0))
    if activation in GATED:
      param(self, key, "gate_edf", dims, fan_in(dims, "d"))
    param(self, key, "up_edf", dims, fan_in(dims, "d"))
    param(self, key, "down_efd", dims, fan_in(dims, "f", out_scale))
    if config.shared:
      wide = dims | {"f": config.shared * dims["f"]}
      self.shared = Mlp(jax.random.fold_in(key, 1), wide, activation, False, out_scale)

  def __call__(self, x_btd, tokens_bt=None, real_bt=None, key=None):
    """See `FeedForward.run`; padding goes to no expert."""
    config = self.config
    if real_bt is None:
      real_bt = jnp.ones(x_btd.shape[:2], bool)
    if config.router == "hash":
      assigned, stats = hashed(config, tokens_bt, real_bt)
    else:
      logits_bte = self._scores(x_btd.astype(jnp.float32), key)
      assigned, stats = route(config, logits_bte, real_bt, getattr(self, "bias_e", None))
    names = [name for name in ("gate_edf", "up_edf", "down_efd") if hasattr(self, name)]
    weights = {name: getattr(self, name) for name in names}
    y_btd = by_expert(
      self._experts, x_btd, assigned.experts_btj, assigned.weights_btj, weights,
      config.slots(x_btd.shape[1]),
    )
    return y_btd + self.shared(x_btd) if config.shared else y_btd, stats

  def _scores(self, x_btd, key):
    """Router scores, fp32. Source of the noise: Shazeer et al. 2017, eq. 4."""
    logits_bte = dot("btd,de->bte", x_btd, self.router_de)
    if not self.config.noisy or key is None:
      return logits_bte
    std_bte = jax.nn.softplus(dot("btd,de->bte", x_btd, self.noise_de))
    return logits_bte + std_bte * jax.random.normal(key, logits_bte.shape)

  def _experts(self, x_td, weights, sizes_e):
    up_tf = grouped_dot(x_td, weights["up_edf"], sizes_e)
    gate_tf = grouped_dot(x_td, weights["gate_edf"], sizes_e) if "gate_edf" in weights else None
    return grouped_dot(activate(self.activation, up_tf, gate_tf), weights["down_efd"], sizes_e)
