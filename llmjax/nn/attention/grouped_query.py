"""Grouped-query attention: n query heads share k key/value heads, g = n / k queries to each."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.nn.attention.context import attend_sharded
from llmjax.nn.attention.kernels import attention_weights
from llmjax.nn.attention.scores import Scores
from llmjax.nn.attention.variant import AttentionInputs, AttentionVariant
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import constant, fan_in, param
from llmjax.nn.position import rotate
from llmjax.nn.projection import project_in, project_out
from llmjax.parallel.rules import key_copies, shard


@dataclasses.dataclass(frozen=True)
class GroupedQuery(AttentionVariant):
  """Grouped-query attention, of which multi-head (k = n) and multi-query (k = 1) are cases.

  Source: Ainslie et al. 2023, arXiv:2305.13245.
  """

  def layer(self, key, dims, config, norm, layout, out_scale) -> nnx.Module:
    return Attention(key, dims, config, norm, layout, out_scale)


class Attention(nnx.Module):
  """Self-attention, with or without a cache, or cross-attention.

  Arguments as of `AttentionVariant.layer`; `norm` is that of queries and keys.
  """

  def __init__(self, key, dims, config, norm: NormConfig, layout: str, out_scale: float):
    self.config = config
    self.layout = layout
    param(self, key, "query_dnh", dims, fan_in(dims, "d"))
    param(self, key, "key_dkh", dims, fan_in(dims, "d"))
    param(self, key, "value_dkh", dims, fan_in(dims, "d"))
    param(self, key, "out_nhd", dims, fan_in(dims, "nh", out_scale))
    biases = {"none": (), "qkv": ("query_bias_nh", "key_bias_kh", "value_bias_kh")}
    biases["all"] = (*biases["qkv"], "out_bias_d")
    for name in biases[config.bias]:
      param(self, key, name, dims, constant(0.0), "bias")
    if config.sinks:
      param(self, key, "sinks_n", dims, constant(0.0), "bias")
    if config.qk_norm != "none":
      all_heads = config.qk_norm == "all"
      norm = dataclasses.replace(norm, bias=False)
      self.query_norm = Norm(key, dims, norm, "nh" if all_heads else "h")
      self.key_norm = Norm(key, dims, norm, "kh" if all_heads else "h")

  def __call__(self, x_btd, inputs: AttentionInputs, positions_bt, cache: KVCache | None = None):
    """Computes self-attention: (y_btd, the cache with the new keys and values or None).

    Args:
      inputs: mask, rope and bias.
      positions_bt: positions that new keys and values are written to the cache with.
    """
    q_btnh, *key_value = project_in(self, x_btd, "query_dnh", "key_dkh", "value_dkh")
    q_btnh, new = self._queries(q_btnh, inputs), self._keys_values(*key_value, inputs.rope)
    if cache is not None:
      cache = new = cache.write(new, positions_bt)
    return self._attend(q_btnh, new, inputs), cache

  def weights(self, x_btd, inputs: AttentionInputs):
    """Computes the weights of self-attention: fp32 [b, n, t, s]. Arguments as of `__call__`."""
    q_btnh, *key_value = project_in(self, x_btd, "query_dnh", "key_dkh", "value_dkh")
    keys = self._keys_values(*key_value, inputs.rope).key_bskh
    return attention_weights(
      self._queries(q_btnh, inputs), keys, inputs.mask, self._scores(q_btnh, inputs)
    )

  def cross_attend(self, x_btd, source: KVCache, inputs: AttentionInputs):
    """Attends to the keys and values of another sequence: y_btd."""
    (q_btnh,) = project_in(self, x_btd, "query_dnh")
    return self._attend(self._queries(q_btnh, inputs), source, inputs)

  def keys_and_values(self, x_bsd, rope=None) -> KVCache:
    """Projects a sequence into keys, normed and rotated, and values.

    Where `tensor` has more devices than there are key heads, each head is there once for each.
    """
    return self._keys_values(*project_in(self, x_bsd, "key_dkh", "value_dkh"), rope)

  def _keys_values(self, k_bskh, v_bskh, rope=None) -> KVCache:
    if self.config.qk_norm != "none":
      k_bskh = self.key_norm(k_bskh)
    if rope is not None:
      k_bskh = rotate(k_bskh, *rope, self.layout)
    copies = key_copies(k_bskh.shape[2])
    if copies > 1:
      k_bskh, v_bskh = (jnp.repeat(a, copies, axis=2) for a in (k_bskh, v_bskh))
    k_bskh, v_bskh = shard(k_bskh, "btkh"), shard(v_bskh, "btkh")
    return KVCache.of(checkpoint_name(k_bskh, "key"), checkpoint_name(v_bskh, "value"))

  def _queries(self, q_btnh, inputs: AttentionInputs):
    if self.config.qk_norm != "none":
      q_btnh = self.query_norm(q_btnh)
    if inputs.rope is not None:
      q_btnh = rotate(q_btnh, *inputs.rope, self.layout)
    return checkpoint_name(shard(q_btnh, "btnh"), "query")

  def _scores(self, q_btnh, inputs: AttentionInputs) -> Scores:
    config = self.config
    scale = config.scale or q_btnh.shape[-1] ** -0.5
    return Scores(scale, config.softcap, inputs.bias, self.sinks_n if config.sinks else None)

  def _attend(self, q_btnh, source: KVCache, inputs: AttentionInputs):
    keys_and_values, scores = (source.key_bskh, source.value_bskh), self._scores(q_btnh, inputs)
    o_btnh = attend_sharded(q_btnh, *keys_and_values, inputs.mask, scores, self.config)
    return project_out(self, shard(o_btnh, "btnh"), "out_nhd")
