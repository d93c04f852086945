"""Grouped-query attention: n query heads share k key/value heads, g = n / k queries to each."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import contract, dot
from llmjax.nn.cache import KVCache
from llmjax.nn.param import fan_in, param
from llmjax.nn.position import rotate
from llmjax.parallel.rules import shard


def attend(q_btnh, k_bskh, v_bskh, mask_bts):
  """Computes softmax(q kᵀ / √h) v within the mask, softmax in fp32.

  Args:
    q_btnh: queries, compute dtype.
    k_bskh: keys; n is a multiple of k, and query head i reads key head i // g.
    v_bskh: values.
    mask_bts: bool, true where a query may look; each query that matters has at least one.
  Returns:
    o_btnh, dtype of `q_btnh`.
  Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245.
  """
  b, t, n, h = q_btnh.shape
  k = k_bskh.shape[2]
  g = n // k
  # Head-major, with a key head's g queries in one axis q = g·t: each (b, k) is then two plain
  # matrix products on contiguous operands, twice as fast on CPU as contracting "btkgh,bskh".
  q_bkqh = (q_btnh * h**-0.5).reshape(b, t, k, g, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
  scores = contract("bkqh,bksh->bkqs", q_bkqh, k_bskh.swapaxes(1, 2), jnp.float32)
  scores = scores.reshape(b, k, g, t, -1)
  scores = jnp.where(mask_bts[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(q_btnh.dtype).reshape(b, k, g * t, -1)
  o_bkqh = contract("bkqs,bksh->bkqh", weights, v_bskh.swapaxes(1, 2))
  return o_bkqh.reshape(b, k, g, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


class Attention(nnx.Module):
  """Causal self-attention with rotary positions.

  Args:
    key: PRNG key of this module.
    dims: sizes of d, n, k and h.
    out_scale: factor on the output projection's initial standard deviation.
  """

  def __init__(self, key, dims, out_scale: float):
    self.query_dnh = param(key, "query_dnh", dims, fan_in(dims, "d"))
    self.key_dkh = param(key, "key_dkh", dims, fan_in(dims, "d"))
    self.value_dkh = param(key, "value_dkh", dims, fan_in(dims, "d"))
    self.out_nhd = param(key, "out_nhd", dims, fan_in(dims, "nh", out_scale))

  def __call__(self, x_btd, rope, mask_bts, positions_bt, cache: KVCache | None = None):
    """Mixes positions.

    Args:
      x_btd: normed residual stream.
      rope: (cos, sin) of the positions.
      mask_bts: who may look at whom; s is the cache's slots where there is a cache.
      positions_bt: slots that new keys and values are written to.
      cache: this layer's keys and values so far.
    Returns:
      (y_btd, the cache with the new positions in it).
    """
    q_btnh = shard(rotate(dot("btd,dnh->btnh", x_btd, self.query_dnh), *rope), "btnh")
    k_btkh = shard(rotate(dot("btd,dkh->btkh", x_btd, self.key_dkh), *rope), "btkh")
    v_btkh = shard(dot("btd,dkh->btkh", x_btd, self.value_dkh), "btkh")
    if cache is not None:
      cache = cache.write(k_btkh, v_btkh, positions_bt)
      k_btkh, v_btkh = cache.key_bskh, cache.value_bskh
    o_btnh = shard(attend(q_btnh, k_btkh, v_btkh, mask_bts), "btnh")
    return shard(dot("btnh,nhd->btd", o_btnh, self.out_nhd), "btd"), cache
