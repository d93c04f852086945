"""Multi-head latent attention: all heads' keys and values are projections of one latent vector. The
cache holds that vector and one rotary key for each position. With few queries, as in decoding, the
up-projections are absorbed into queries and results; otherwise keys and values are expanded."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.choices import check_fields
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.nn.attention.context import attend_sharded
from llmjax.nn.attention.kernels import attention_weights
from llmjax.nn.attention.scores import Scores
from llmjax.nn.attention.variant import AttentionInputs, AttentionVariant
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import fan_in, param
from llmjax.nn.position import rotate
from llmjax.nn.projection import project_in, project_out
from llmjax.parallel.rules import shard

EPS = 1e-6  # of the norms of latents, in the published models whatever that of the others is


@dataclasses.dataclass(frozen=True)
class LatentConfig(AttentionVariant):
  """Multi-head latent attention.

  Attributes:
    kv_rank: width of the latent vector of keys and values (r); 0 turns latent attention off.
    query_rank: width of the latent vector of queries; 0: queries are projected from the stream.
    rope_dim: channels of a head that are rotated; their key is shared by all heads.
    nope_dim: channels of a head without positions.
    value_dim: channels of a head's values.
  """

  kv_rank: int = 0
  query_rank: int = 0
  rope_dim: int = 0
  nope_dim: int = 0
  value_dim: int = 0

  def __post_init__(self):
    section = "model.attention.latent"
    check_fields(section, self, kv_rank=0, query_rank=0)
    if not self.used and any(dataclasses.astuple(self)):
      raise UserError(f"{section} changes nothing without {section}.kv_rank")
    if self.used:
      check_fields(section, self, rope_dim=2, nope_dim=1, value_dim=1)
      if self.value_dim > self.width:
        raise UserError(f"{section}.value_dim {self.value_dim} is above nope_dim + rope_dim")

  @property
  def used(self) -> bool:
    return self.kv_rank > 0

  @property
  def width(self) -> int:
    """Channels of a head's queries and keys."""
    return self.nope_dim + self.rope_dim

  def layer(self, key, dims, config, norm, layout, out_scale) -> nnx.Module:
    return LatentAttention(key, dims, config, norm, layout, out_scale)

  def cache_shapes(self, dims, batch: int, slots: int) -> tuple:
    return (batch, 1, slots, self.kv_rank + self.rope_dim), None

  def head_dim(self, model) -> int:
    return self.width

  def rotary_dim(self, model) -> int:
    return self.rope_dim

  def check(self, model):
    attention, position, h = model.attention, model.position, self.width
    if (attention.sinks, attention.qk_norm, attention.bias) != (False, "none", "none"):
      raise UserError("latent attention has no sinks, qk_norm or bias: leave model.attention's")
    if model.kv_heads not in (0, model.heads) or model.head_dim not in (0, h):
      raise UserError(
        f"latent attention decides heads itself: leave model.kv_heads {model.kv_heads} and "
        f"model.head_dim {model.head_dim}, or set them to {model.heads} and {h}"
      )
    if position.kind != "rope" or position.fraction != 1:
      raise UserError(
        "latent attention turns all of rope_dim: model.position.kind=rope, fraction=1"
      )
    if model.kind not in ("decoder", "encoder"):
      raise UserError(f"model.kind={model.kind} has no latent attention")

  def shrunk(self, devices: int, head_dim: int) -> "LatentConfig":
    ranks = [rank and 8 * math.gcd(rank, devices) for rank in (self.kv_rank, self.query_rank)]
    return LatentConfig(*ranks, head_dim // 2, head_dim // 2, head_dim - 2)


class LatentAttention(nnx.Module):
  """Latent attention of a row to itself or to a cache of latents.

  In names of weights r is the rank of a latent, and h the channels of a head that the weight
  computes. Arguments as of `AttentionVariant.layer`; `norm` is the latents', apart from its eps.

  Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.1, eq. 9 to 19 and appendix C.
  """

  def __init__(self, key, dims, config, norm: NormConfig, layout: str, out_scale: float):
    self.config, self.layout = config, layout
    latent = config.latent
    norm = dataclasses.replace(norm, bias=False, eps=EPS)
    sizes = lambda h, r=latent.kv_rank: dims | {"h": h, "r": r}  # noqa: E731
    if latent.query_rank:
      query = sizes(latent.width, latent.query_rank)
      param(self, key, "query_down_dr", query, fan_in(query, "d"))
      self.query_norm = Norm(key, query, norm, "r")
      param(self, key, "query_up_rnh", query, fan_in(query, "r"))
    else:
      param(self, key, "query_dnh", sizes(latent.width), fan_in(dims, "d"))
    nope, rope, value = (sizes(h) for h in (latent.nope_dim, latent.rope_dim, latent.value_dim))
    param(self, key, "latent_dr", nope, fan_in(dims, "d"))
    self.latent_norm = Norm(key, nope, norm, "r")
    param(self, key, "key_rope_dh", rope, fan_in(dims, "d"))
    param(self, key, "key_up_rnh", nope, fan_in(nope, "r"))
    param(self, key, "value_up_rnh", value, fan_in(value, "r"))
    param(self, key, "out_nhd", value, fan_in(value, "nh", out_scale))

  def __call__(self, x_btd, inputs: AttentionInputs, positions_bt, cache: KVCache | None = None):
    """See `Attention`; the cache's keys are latents, each with its rotary key after it."""
    q_btnh, latent_bsr = self._queries(x_btd, inputs), self._latents(x_btd, inputs)
    attend = self._expanded
    if cache is not None:
      cache = cache.write(KVCache(latent_bsr[:, None]), positions_bt)
      latent_bsr = cache.key_bksh[:, 0]
      attend = self._absorbed if self._absorbing_is_cheaper(q_btnh.shape[1]) else self._expanded
    o_btnh = attend(q_btnh, latent_bsr, inputs)
    return project_out(self, shard(o_btnh, "btnh"), "out_nhd"), cache

  def weights(self, x_btd, inputs: AttentionInputs):
    """Computes the weights of attention: fp32 [b, n, t, s]. Arguments as of `__call__`."""
    q_btnh = self._queries(x_btd, inputs)
    keys, _ = self._keys_values(self._latents(x_btd, inputs))
    return attention_weights(q_btnh, keys, inputs.mask, self._scores())

  def _absorbing_is_cheaper(self, queries: int) -> bool:  # by multiplications a cached position
    latent = self.config.latent
    expanded = latent.nope_dim + latent.value_dim
    return queries * (2 * latent.kv_rank - expanded) < latent.kv_rank * expanded

  def _queries(self, x_btd, inputs: AttentionInputs):
    if self.config.latent.query_rank:
      c_btr = self.query_norm(dot("btd,dr->btr", x_btd, self.query_down_dr))
      (q_btnh,) = project_in(self, c_btr, "query_up_rnh")
    else:
      (q_btnh,) = project_in(self, x_btd, "query_dnh")
    plain, rotated = jnp.split(q_btnh, [self.config.latent.nope_dim], axis=-1)
    rotated = rotate(rotated, *inputs.rope, self.layout)
    return checkpoint_name(shard(jnp.concatenate([plain, rotated], axis=-1), "btnh"), "query")

  def _latents(self, x_btd, inputs: AttentionInputs):
    """Normed latents, each with its rotary key after it: [b, t, r + h]."""
    c_btr = self.latent_norm(dot("btd,dr->btr", x_btd, self.latent_dr))
    k_bth = dot("btd,dh->bth", x_btd, self.key_rope_dh)
    k_bth = rotate(k_bth[:, :, None], *inputs.rope, self.layout)[:, :, 0]
    return checkpoint_name(jnp.concatenate([c_btr, k_bth], axis=-1), "key")

  def _expanded(self, q_btnh, latent_bsr, inputs: AttentionInputs):
    return self._attend(q_btnh, *self._keys_values(latent_bsr), inputs)

  def _keys_values(self, latent_bsr):
    """Every head's keys and values, projected from the latents: (k_bsnh, v_bsnh)."""
    c_bsr, k_bsh = jnp.split(latent_bsr, [self.config.latent.kv_rank], axis=-1)
    k_bsnh, v_bsnh = project_in(self, c_bsr, "key_up_rnh", "value_up_rnh")
    k_bs1h = shard(k_bsh[:, :, None], "bt1h")
    rotated = jnp.broadcast_to(k_bs1h, (*k_bsnh.shape[:3], k_bsh.shape[-1]))
    return shard(jnp.concatenate([k_bsnh, rotated], axis=-1), "btnh"), v_bsnh

  def _absorbed(self, q_btnh, latent_bsr, inputs: AttentionInputs):
    """Attends to the latents, q · (c W) = (q Wᵀ) · c, and projects the results to values."""
    latent = self.config.latent
    plain, rotated = jnp.split(q_btnh, [latent.nope_dim], axis=-1)
    q_btnr = dot("btnh,rnh->btnr", plain, self.key_up_rnh)
    q_btnr = jnp.concatenate([q_btnr, rotated], axis=-1)
    kv_bs1r = latent_bsr[:, :, None]  # read once: the rotary key's share of the result is dropped
    o_btnr = self._attend(q_btnr, kv_bs1r, kv_bs1r, inputs)[..., : latent.kv_rank]
    return dot("btnr,rnh->btnh", o_btnr, self.value_up_rnh)

  def _scores(self) -> Scores:
    config = self.config
    return Scores(config.scale or config.latent.width**-0.5, config.softcap)

  def _attend(self, q_btnh, k_bskh, v_bskh, inputs: AttentionInputs):
    return attend_sharded(q_btnh, k_bskh, v_bskh, inputs.mask, self._scores(), self.config)
