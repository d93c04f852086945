"""A stack of layers: its weights, and the inputs that all of its layers share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.data.batch import Batch
from llmjax.models.block import Block, LayerInputs
from llmjax.models.config import ModelConfig
from llmjax.models.depth import Group, run_layers
from llmjax.nn.attention.mask import Mask, cache_mask, cross_mask, self_mask
from llmjax.nn.attention.scores import Bias, alibi_slopes
from llmjax.nn.attention.variant import AttentionInputs
from llmjax.nn.cache.dense import Cache, KVCache, shard_keys
from llmjax.nn.norm import Norm
from llmjax.nn.param import normal, param
from llmjax.nn.position import rope_angles
from llmjax.parallel.rules import key_copies, shard


class Stack(nnx.Module):
  """Blocks, cross-attention in them if `cross`, and the norm after the last one."""

  fp32 = ("relative_in",)  # added to fp32 scores

  def __init__(
    self, key, config: ModelConfig, causal: bool, layers: int | None = None, cross: bool = False
  ):
    blocks_key, norm_key = jax.random.split(key)
    self.config, self.causal, self.cross = config, causal, cross
    layers = layers or config.layers
    keys = jax.random.split(blocks_key, layers)
    for name, start, end, feed_forward in config.groups(layers):
      block = functools.partial(Block, config=config, feed_forward=feed_forward, cross=cross)
      setattr(self, name, nnx.data(jax.vmap(block)(keys[start:end])))
    if config.norm.final and config.norm.place != "post":
      self.norm = Norm(norm_key, config.dims, config.norm)
    if config.position.kind == "relative":
      dims = config.dims | {"i": config.position.buckets}
      param(self, norm_key, "relative_in", dims, normal(config.width**-0.5), "table")

  def __call__(self, x_btd, inputs: LayerInputs, cache: Cache | None = None):
    """Runs all blocks and the final norm: (x_btd, cache, routers' statistics or None).

    Args:
      inputs: the result of `layer_inputs` for the same batch and cache.
    """
    layers, source = (None, None) if cache is None else (cache.layers, cache.source)
    x_btd, layers, stats = run_layers(self.groups, x_btd, inputs, self.config, layers, source)
    cache = None if cache is None else dataclasses.replace(cache, layers=layers)
    return self.final_norm(x_btd), cache, stats

  @property
  def named_groups(self) -> list[tuple[str, Group]]:
    """The groups of layers in order, with the names of the attributes that hold their blocks."""
    groups, start = [], 0
    for name, *_ in self.config.groups(self.config.layers):
      blocks = getattr(self, name)
      if not isinstance(blocks, tuple) or blocks:
        groups.append((name, Group.of(blocks, start)))
        start = groups[-1][1].end
    return groups

  @property
  def groups(self) -> tuple[Group, ...]:
    """The groups of layers in order."""
    return tuple(group for _, group in self.named_groups)

  def layer_inputs(
    self, batch: Batch, key=None, cache: Cache | None = None, memory_bsd=None,
    memory_segments_bs=None,
  ) -> LayerInputs:
    """Makes the inputs that all layers share.

    Args:
      batch: segments, positions, prefix, and tokens for routers that read them. With a cache a row
        is one document, and segments only mark padding.
      cache: keys and values so far, with slots reserved for the batch's positions; its prefix
        counts, not the batch's.
      memory_bsd: what cross-attention attends to, where the cache does not hold it.
      memory_segments_bs: int32 segment numbers of the memory.
    """
    positions_bt, segments_bt = positions_of(batch), batch.segments_bt
    written_bt = positions_bt if cache is None else kept_positions(batch)
    cross = None
    if self.cross:
      q_segments_bt = jnp.ones_like(positions_bt) if segments_bt is None else segments_bt
      cross = AttentionInputs(cross_mask(q_segments_bt, positions_bt, memory_segments_bs))
    attention = {
      kind: AttentionInputs(
        self._mask(kind, positions_bt, batch, cache), self._rope(kind, positions_bt, segments_bt),
        self._bias(),
      )
      for kind in dict.fromkeys(cache.positions if cache else self.config.attention.pattern)
    }
    # Constrained, or the sharding of experts' tokens would spread to attention's masks.
    real_bt = None if segments_bt is None else shard(segments_bt > 0, "bt")
    return LayerInputs(attention, written_bt, cross, memory_bsd, key, batch.tokens_bt, real_bt)

  def final_norm(self, x_btd):
    """Applies the norm after the last block, if there is one."""
    return self.norm(x_btd) if hasattr(self, "norm") else x_btd

  def project_memory(self, memory_bsd) -> tuple[KVCache, ...]:
    """Projects another stack's result into every layer's keys and values of cross-attention."""
    blocks = [block for group in self.groups for block in group.layers]
    return tuple(block.cross_attention.keys_and_values(memory_bsd) for block in blocks)

  def empty_cache(self, batch: int, slots: int, chunk: int | None = None) -> Cache:
    """Makes the cache of `slots` positions of `batch` rows, in the compute dtype.

    Args:
      chunk: most positions of a row in a call, or None. Layers with a window of w positions then
        keep only the last w + chunk - 1 keys.
    """
    config, attention = self.config, self.config.attention
    kinds, k = config.layer_kinds, config.dims["k"]
    dims = config.dims | {"k": k * key_copies(k)}
    sizes = dict.fromkeys(kinds, slots)
    if chunk and "window" in sizes and attention.mask != "prefix":
      sizes["window"] = min(slots, attention.window + chunk - 1)

    def layer(slots: int) -> KVCache:
      shapes = attention.variant.cache_shapes(dims, batch, slots)
      zeros = [shape and jnp.zeros(shape, jnp.dtype(config.dtype)) for shape in shapes]
      return shard_keys(KVCache(*zeros))

    positions = {kind: jnp.full((batch, size), -1, jnp.int32) for kind, size in sizes.items()}
    prefix_b = jnp.zeros(batch, jnp.int32) if attention.mask == "prefix" else None
    layers = tuple(layer(sizes[kind]) for kind in kinds)
    return Cache(layers, positions, kinds, slots, prefix_b=prefix_b)

  def _mask(self, kind, positions_bt, batch: Batch, cache: Cache | None) -> Mask:
    attention = self.config.attention
    rule = attention.rule(kind, self.causal)
    if cache is not None:
      # The prefix is the cache's: later queries attend to it too.
      return cache_mask(rule, positions_bt, *cache.seen_positions(kind))
    prefix_bt = batch.prefix_bt if attention.mask == "prefix" else None
    return self_mask(rule, batch.segments_bt, positions_bt, prefix_bt)

  def _rope(self, kind, positions_bt, segments_bt):
    position, h = self.config.position, self.config.rotary_head
    if position.kind != "rope":
      return None
    return rope_angles(positions_bt, position, h, kind == "window", segments_bt)

  def _bias(self) -> Bias | None:
    position = self.config.position
    if position.kind == "alibi":
      return Bias(slopes_n=jnp.asarray(alibi_slopes(self.config.heads), jnp.float32))
    if position.kind == "relative":
      return Bias(None, self.relative_in, position.max_distance, both_ways=not self.causal)
    return None


def kept_positions(batch: Batch):
  """Positions that keys are written to a cache with: -1 for padding."""
  positions_bt, segments_bt = positions_of(batch), batch.segments_bt
  return positions_bt if segments_bt is None else jnp.where(segments_bt > 0, positions_bt, -1)


def positions_of(batch: Batch):
  """Positions within documents: by default 0, 1, 2 … along each row."""
  if batch.positions_bt is not None:
    return batch.positions_bt
  return jnp.broadcast_to(jnp.arange(batch.tokens_bt.shape[1]), batch.tokens_bt.shape)
