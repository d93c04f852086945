"""Multi-head latent attention: all heads' keys and values are made of one short vector a position.

The cache keeps that vector and one rotary key, nothing per head. Where queries are few, as in
decoding, they are turned so that they meet the vectors as they lie; elsewhere keys and values are
made of them.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.dot import dot
from llmjax.nn.attention.context import attend_cut
from llmjax.nn.attention.grouped_query import AttentionConfig, AttentionInputs
from llmjax.nn.attention.scores import Scores
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import fan_in, param
from llmjax.nn.position import rotate
from llmjax.parallel.rules import shard
from llmjax.parallel.tensor import column_parallel, row_parallel

# Of the latents' norms, whatever that of the others is: the published models have no other.
EPS = 1e-6


class LatentAttention(nnx.Module):
  """Attention of a row to itself or to a cache of latents; takes what `Attention` takes.

  A head's queries and keys are `nope_dim` channels without position and `rope_dim` turned ones, of
  which the key's are the same for all heads. Letter r is a rank, and h whichever part of a head a
  weight makes. Arguments as of `Attention`; `norm` is of the latents, but for its eps.

  Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.1, eq. 9 to 19 and appendix C.
  """

  def __init__(
    self, key, dims, config: AttentionConfig, norm: NormConfig, layout: str, out_scale: float
  ):
    self.config, self.layout = config, layout
    latent = config.latent
    norm = dataclasses.replace(norm, bias=False, eps=EPS)
    part = lambda h, r=latent.kv_rank: dims | {"h": h, "r": r}  # noqa: E731
    if latent.query_rank:
      whole = part(latent.head_dim, latent.query_rank)
      param(self, key, "query_down_dr", whole, fan_in(whole, "d"))
      self.query_norm = Norm(key, whole, norm, "r")
      param(self, key, "query_up_rnh", whole, fan_in(whole, "r"))
    else:
      param(self, key, "query_dnh", part(latent.head_dim), fan_in(dims, "d"))
    nope, rope, value = (part(h) for h in (latent.nope_dim, latent.rope_dim, latent.value_dim))
    param(self, key, "latent_dr", nope, fan_in(dims, "d"))
    self.latent_norm = Norm(key, nope, norm, "r")
    param(self, key, "key_rope_dh", rope, fan_in(dims, "d"))
    param(self, key, "key_up_rnh", nope, fan_in(nope, "r"))
    param(self, key, "value_up_rnh", value, fan_in(value, "r"))
    param(self, key, "out_nhd", value, fan_in(value, "nh", out_scale))

  def __call__(self, x_btd, view: AttentionInputs, positions_bt, cache: KVCache | None = None):
    """Mixes a row's positions; see `Attention`. A latent and its rotary key are one `key`."""
    q_btnh, kept_bsr = self._queries(x_btd, view), self._latents(x_btd, view)
    attend = self._expanded
    if cache is not None:
      cache = cache.write(KVCache(kept_bsr[:, None]), positions_bt)
      kept_bsr = cache.key_bksh[:, 0]
      attend = self._absorbed if self._few(q_btnh.shape[1]) else self._expanded
    o_btnh = shard(attend(q_btnh, kept_bsr, view), "btnh")
    project = lambda o_btnh, weights: dot("btnh,nhd->btd", o_btnh, weights["out_nhd"])  # noqa: E731
    return row_parallel(project, o_btnh, {"out_nhd": self.out_nhd}, "btnh"), cache

  def _few(self, queries: int) -> bool:
    """Whether so many queries cost less absorbed, by multiplications for each kept position."""
    latent = self.config.latent
    made = latent.nope_dim + latent.value_dim
    return queries * (2 * latent.kv_rank - made) < latent.kv_rank * made

  def _queries(self, x_btd, view: AttentionInputs):
    """Queries whose last channels are turned: q_btnh."""
    name, eq = "query_dnh", "btd,dnh->btnh"
    if self.config.latent.query_rank:
      x_btd = self.query_norm(dot("btd,dr->btr", x_btd, self.query_down_dr))
      name, eq = "query_up_rnh", "btr,rnh->btnh"
    project = lambda x, weights: (dot(eq, x, weights[name]),)  # noqa: E731
    (q_btnh,) = column_parallel(project, x_btd, {name: getattr(self, name)}, ("btnh",))
    plain, turned = jnp.split(q_btnh, [self.config.latent.nope_dim], axis=-1)
    turned = rotate(turned, *view.rope, self.layout)
    return checkpoint_name(shard(jnp.concatenate([plain, turned], axis=-1), "btnh"), "query")

  def _latents(self, x_btd, view: AttentionInputs):
    """What is kept of positions: normed latents, and the rotary key behind them: [b, t, r + h]."""
    c_btr = self.latent_norm(dot("btd,dr->btr", x_btd, self.latent_dr))
    k_bth = dot("btd,dh->bth", x_btd, self.key_rope_dh)
    k_bth = rotate(k_bth[:, :, None], *view.rope, self.layout)[:, :, 0]
    return checkpoint_name(jnp.concatenate([c_btr, k_bth], axis=-1), "key")

  def _expanded(self, q_btnh, kept_bsr, view: AttentionInputs):
    """Makes every head's keys and values."""
    c_bsr, k_bsh = jnp.split(kept_bsr, [self.config.latent.kv_rank], axis=-1)
    names = ("key_up_rnh", "value_up_rnh")
    project = lambda c_bsr, weights: tuple(  # noqa: E731
      dot("bsr,rnh->bsnh", c_bsr, weights[name]) for name in names
    )
    weights = {name: getattr(self, name) for name in names}
    k_bsnh, v_bsnh = column_parallel(project, c_bsr, weights, ("btnh", "btnh"))
    k_bs1h = shard(k_bsh[:, :, None], "bt1h")
    turned = jnp.broadcast_to(k_bs1h, (*k_bsnh.shape[:3], k_bsh.shape[-1]))
    k_bsnh = shard(jnp.concatenate([k_bsnh, turned], axis=-1), "btnh")
    return self._attend(q_btnh, k_bsnh, v_bsnh, view)

  def _absorbed(self, q_btnh, kept_bsr, view: AttentionInputs):
    """q · (c W) is (q Wᵀ) · c: queries meet latents, and results are turned into values."""
    latent = self.config.latent
    plain, turned = jnp.split(q_btnh, [latent.nope_dim], axis=-1)
    q_btnr = dot("btnh,rnh->btnr", plain, self.key_up_rnh)
    q_btnr = jnp.concatenate([q_btnr, turned], axis=-1)
    kept_bs1r = kept_bsr[:, :, None]  # read once: the rotary key's share of the result is dropped
    o_btnr = self._attend(q_btnr, kept_bs1r, kept_bs1r, view)[..., : latent.kv_rank]
    return dot("btnr,rnh->btnh", o_btnr, self.value_up_rnh)

  def _attend(self, q_btnh, k_bskh, v_bskh, view: AttentionInputs):
    config = self.config
    scores = Scores(config.scale or config.latent.head_dim**-0.5, config.softcap)
    return attend_cut(
      q_btnh, k_bskh, v_bskh, view.mask, scores, config.kernel, config.block,
      config.context_parallel,
    )
