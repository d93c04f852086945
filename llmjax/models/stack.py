"""A stack of layers: its weights, and what all of its layers see alike."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.data.batch import Batch
from llmjax.models.block import Block, LayerInputs
from llmjax.models.config import ModelConfig
from llmjax.models.depth import count, run_layers
from llmjax.nn.attention.grouped_query import AttentionInputs
from llmjax.nn.attention.mask import Mask, cache_mask, cross_mask, self_mask
from llmjax.nn.bias import Bias, alibi_slopes
from llmjax.nn.cache.dense import Cache, KVCache, shard_keys
from llmjax.nn.norm import Norm
from llmjax.nn.param import normal, param
from llmjax.nn.position import rope_angles
from llmjax.parallel.rules import shard


class Stack(nnx.Module):
  """Blocks one after another, and the norm after the last.

  Args:
    key: PRNG key of the stack.
    config: the architecture.
    causal: whether a position sees those before it alone.
    layers: blocks; the config's `layers` by default.
    cross: the blocks also look at another stack's result.
  """

  def __init__(
    self, key, config: ModelConfig, causal: bool, layers: int | None = None, cross: bool = False
  ):
    blocks_key, norm_key = jax.random.split(key)
    self.config = config
    self.causal = causal
    self.cross = cross
    keys = jax.random.split(blocks_key, layers or config.layers)
    first = config.moe.first_k_dense  # these have other weights than the rest
    make = lambda dense: jax.vmap(lambda key: Block(key, config, cross, dense))  # noqa: E731
    self.first = nnx.data(make(True)(keys[:first]) if first else ())
    self.blocks = nnx.data(make(False)(keys[first:]))
    if config.norm.final and config.norm.place != "post":
      self.norm = Norm(norm_key, config.dims, config.norm)
    if config.position.kind == "relative":
      dims = config.dims | {"i": config.position.buckets}
      param(self, norm_key, "relative_in", dims, normal(config.width**-0.5), "table")

  def __call__(
    self, x_btd, shared: LayerInputs, cache: Cache | None = None, source: KVCache | None = None
  ):
    """Runs all blocks.

    Args:
      x_btd: embedded tokens.
      shared: what `shared` made of the same rows and cache.
      cache: keys and values so far.
      source: what `look_up` made of the other stack's result, where there is cross attention.
    Returns:
      (x_btd normed, the cache with these positions in it, what routers did or None).
    """
    own, first = None if cache is None else cache.layers, self.dense
    part = lambda a, b: jax.tree.map(lambda leaf: leaf[a:b], (own, source))  # noqa: E731
    x_btd, before = self.run_first(x_btd, shared, part(0, first) if first else (None, None))
    rest = part(first, None) if first else (own, source)
    x_btd, (kept, routing) = run_layers(self.blocks, x_btd, rest, shared, self.config, first)
    if first:
      kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), before, kept)
    cache = None if cache is None else dataclasses.replace(cache, layers=kept)
    return self.final_norm(x_btd), cache, routing

  @property
  def dense(self) -> int:
    """How many first layers stand apart because they are dense where the others have experts."""
    return 0 if self.first == () else count(self.first)

  def run_first(self, x_btd, shared: LayerInputs, each=(None, None)):
    """Runs these: (x_btd, caches)."""
    if not self.dense:
      return x_btd, None
    x_btd, (caches, _) = run_layers(self.first, x_btd, each, shared, self.config)
    return x_btd, caches

  def shared(
    self, batch: Batch, key=None, cache: Cache | None = None, source_segments_bs=None
  ) -> LayerInputs:
    """Makes what all layers are given alike.

    Args:
      batch: segments, positions (with a cache: its slots), prefix, and tokens for routers that
        read them. A cache holds one document a row: segments then say what is padding, no more.
      key: PRNG key of dropout.
      cache: keys and values so far, with slots reserved for the batch's positions; its prefix
        counts, not the batch's.
      source_segments_bs: int32 document numbers of what cross attention looks at.
    """
    positions_bt, segments_bt = positions_of(batch), batch.segments_bt
    written_bt = positions_bt if cache is None else kept_positions(batch)
    source_view = None
    if self.cross:
      numbers_bt = jnp.ones_like(positions_bt) if segments_bt is None else segments_bt
      source_view = AttentionInputs(cross_mask(numbers_bt, positions_bt, source_segments_bs))
    views = {
      kind: AttentionInputs(
        self._mask(kind, positions_bt, batch, cache),
        self._rope(kind, positions_bt, segments_bt),
        self._bias(),
      )
      for kind in dict.fromkeys(self.config.attention.pattern)
    }
    # Pinned, or the layout of experts' rows would spread to what attention sees.
    real_bt = None if segments_bt is None else shard(segments_bt > 0, "bt")
    return LayerInputs(views, written_bt, source_view, key, batch.tokens_bt, real_bt)

  def final_norm(self, x_btd):
    """Norms what the last block returns, where the config has it so."""
    return self.norm(x_btd) if hasattr(self, "norm") else x_btd

  def project_memory(self, memory_bsd) -> KVCache:
    """Projects another stack's result into every layer's keys and values (`lbksh`)."""
    project = lambda block: block.cross_attention.keys_and_values(memory_bsd)  # noqa: E731
    if isinstance(self.blocks, tuple):
      return tuple(project(block) for block in self.blocks)
    return jax.lax.map(project, self.blocks)

  def empty_cache(self, batch: int, slots: int, chunk: int | None = None) -> Cache:
    """Makes the cache of `slots` positions of `batch` rows, in the compute dtype.

    Args:
      chunk: most positions of a row that are read at a time; None: any number. Unstacked layers
        with a window of w positions then keep the last w + chunk - 1 keys alone.
    """
    dims, latent = self.config.dims, self.config.attention.latent
    k, h = (1, latent.kv_rank + latent.rope_dim) if latent.kv_rank else (dims["k"], dims["h"])
    unstacked = isinstance(self.blocks, tuple)
    layers = len(self.blocks) if unstacked else count(self.blocks) + self.dense
    attention = self.config.attention
    kinds = tuple(itertools.islice(itertools.cycle(attention.pattern), layers))
    sizes = dict.fromkeys(kinds, slots)
    if unstacked and chunk and "window" in sizes and attention.mask != "prefix":
      sizes["window"] = min(slots, attention.window + chunk - 1)

    def layer(slots: int) -> KVCache:
      zeros = jnp.zeros((batch, k, slots, h), jnp.dtype(self.config.dtype))
      return shard_keys(KVCache(zeros, None if latent.kv_rank else zeros))

    if unstacked:
      keys = tuple(layer(sizes[kind]) for kind in kinds)
    else:
      keys = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], layers, 0), layer(slots))
    positions = {kind: jnp.full((batch, size), -1, jnp.int32) for kind, size in sizes.items()}
    prefix_b = jnp.zeros(batch, jnp.int32) if attention.mask == "prefix" else None
    return Cache(keys, positions, kinds, slots, prefix_b=prefix_b)

  def _mask(self, kind, positions_bt, batch: Batch, cache: Cache | None) -> Mask:
    attention = self.config.attention
    rule = attention.rule(kind, self.causal)
    if cache is not None:
      # The prefix is the cache's: later queries see it too, however far away.
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
  """Positions of the keys that a cache keeps: -1 for padding."""
  positions_bt, segments_bt = positions_of(batch), batch.segments_bt
  return positions_bt if segments_bt is None else jnp.where(segments_bt > 0, positions_bt, -1)


def positions_of(batch: Batch):
  """Places within documents: 0, 1, 2 … along each row where a batch says nothing else."""
  if batch.positions_bt is not None:
    return batch.positions_bt
  return jnp.broadcast_to(jnp.arange(batch.tokens_bt.shape[1]), batch.tokens_bt.shape)
