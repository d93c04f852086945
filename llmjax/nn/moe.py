"""Mixture of experts: a router, and feed-forward layers of which each token uses a few."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import dot
from llmjax.core.grouped import grouped_dot
from llmjax.nn.mlp import GATED, PLAIN, Mlp, gated
from llmjax.nn.param import constant, fan_in, param
from llmjax.nn.router import MoeConfig, RouterStats, hashed, route
from llmjax.parallel.expert import by_expert


class Moe(nnx.Module):
  """Sums the results of a token's experts, and of those that all tokens share.

  Args:
    key: PRNG key of this module.
    dims: sizes of d and f.
    config: router and experts.
    activation: a name of `PLAIN` or of `GATED`.
    out_scale: factor on the down projection's initial standard deviation.

  Source: Shazeer et al. 2017, arXiv:1701.06538; shared and narrow experts: Dai et al. 2024,
    arXiv:2401.06066, sec. 3.
  """

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

  def __call__(
    self, x_btd, tokens_bt=None, real_bt=None, key=None
  ) -> tuple[jax.Array, RouterStats]:
    """Sends tokens through their experts.

    Args:
      x_btd: normed residual stream.
      tokens_bt: int32 ids, which a hash router reads.
      real_bt: bool, False for padding, which goes nowhere; None: all are real.
      key: PRNG key of a noisy router; None adds no noise.
    Returns:
      (y_btd, what the router did).
    """
    config = self.config
    if real_bt is None:
      real_bt = jnp.ones(x_btd.shape[:2], bool)
    if config.router == "hash":
      routes, routing = hashed(config, tokens_bt, real_bt)
    else:
      logits_bte = self._scores(x_btd.astype(jnp.float32), key)
      routes, routing = route(config, logits_bte, real_bt, getattr(self, "bias_e", None))
    names = [name for name in ("gate_edf", "up_edf", "down_efd") if hasattr(self, name)]
    weights = {name: getattr(self, name) for name in names}
    y_btd = by_expert(
      self._experts, x_btd, routes.experts_btj, routes.weights_btj, weights,
      config.slots(x_btd.shape[1]),
    )
    return y_btd + self.shared(x_btd) if config.shared else y_btd, routing

  def _scores(self, x_btd, key):
    """Router scores, fp32. Source of the noise: Shazeer et al. 2017, eq. 4."""
    logits_bte = dot("btd,de->bte", x_btd, self.router_de)
    if not self.config.noisy or key is None:
      return logits_bte
    width_bte = jax.nn.softplus(dot("btd,de->bte", x_btd, self.noise_de))
    return logits_bte + width_bte * jax.random.normal(key, logits_bte.shape)

  def _experts(self, x_td, weights, sizes_e):
    up_tf = grouped_dot(x_td, weights["up_edf"], sizes_e)
    if self.activation in GATED:
      gate_tf = grouped_dot(x_td, weights["gate_edf"], sizes_e)
      hidden_tf = gated(self.activation, gate_tf, up_tf)
    else:
      hidden_tf = PLAIN[self.activation](up_tf)
    return grouped_dot(hidden_tf, weights["down_efd"], sizes_e)
