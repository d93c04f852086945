"""Layers stacked over `l`: the only place that knows how depth is run (scan, unrolled, remat)."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.models.block import Block
from llmjax.models.config import ModelConfig
from llmjax.nn.attention import View
from llmjax.nn.cache import Cache, KVCache
from llmjax.nn.dropout import NAMES
from llmjax.nn.mask import Mask, cache_mask, cross_mask, self_mask
from llmjax.nn.norm import Norm
from llmjax.nn.param import normal, param
from llmjax.nn.position import Bias, alibi_slopes, rope_angles

_policies = jax.checkpoint_policies
_POLICIES = {
  "full": _policies.nothing_saveable,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "save_projections": _policies.save_only_these_names(*NAMES),
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(NAMES),
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


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
    self.blocks = nnx.data(
      jax.vmap(lambda key: Block(key, config, cross))(
        jax.random.split(blocks_key, layers or config.layers)
      )
    )
    if config.norm.final and config.norm.place != "post":
      self.norm = Norm(norm_key, config.dims, config.norm)
    if config.position.kind == "relative":
      dims = config.dims | {"i": config.position.buckets}
      self.relative_in = param(norm_key, "relative_in", dims, normal(config.width**-0.5))

  def __call__(
    self,
    x_btd,
    positions_bt,
    segments_bt=None,
    prefix_bt=None,
    cache: Cache | None = None,
    memory_bsd=None,
    source_segments_bs=None,
    key=None,
  ):
    """Runs all blocks.

    Args:
      x_btd: embedded tokens.
      positions_bt: int32 places within the document; slots of the cache.
      segments_bt: int32 documents of a packed row, 0 for padding; None: one document. With a cache
        it is not read: rows of a cache hold one document each.
      prefix_bt: bool, tokens that their whole document sees.
      cache: keys and values so far.
      memory_bsd: the other stack's result, where there is cross attention and no cache.
      source_segments_bs: int32 document numbers of `memory_bsd`.
      key: PRNG key of dropout; None drops nothing.
    Returns:
      (x_btd normed, the cache with these positions in it).
    """
    source = self.look_up(memory_bsd) if self.cross and cache is None else cache and cache.source
    if cache is not None and cache.prefix_bs is not None and prefix_bt is not None:
      cache = dataclasses.replace(cache, prefix_bs=_mark(cache.prefix_bs, prefix_bt, positions_bt))
    shared = self.shared(positions_bt, segments_bt, prefix_bt, cache, source_segments_bs, key)
    each = (None if cache is None else cache.own, source)
    x_btd, own = run_layers(self.blocks, x_btd, each, shared, self.config)
    return self.leave(x_btd), None if cache is None else dataclasses.replace(cache, own=own)

  def shared(
    self, positions_bt, segments_bt=None, prefix_bt=None, cache=None, source_segments_bs=None,
    key=None,
  ):
    """Makes what all layers are given alike: (views by kind, positions, source view, key)."""
    source_view = None
    if self.cross:
      numbers_bs = source_segments_bs if cache is None else cache.source_segments_bs
      numbers_bt = jnp.ones_like(positions_bt) if segments_bt is None else segments_bt
      source_view = View(cross_mask(numbers_bt, positions_bt, numbers_bs))
    views = self._views(positions_bt, segments_bt, prefix_bt, cache)
    return views, positions_bt, source_view, key

  def leave(self, x_btd):
    """Norms what the last block returns, where the config has it so."""
    return self.norm(x_btd) if hasattr(self, "norm") else x_btd

  def look_up(self, memory_bsd) -> KVCache:
    """Projects another stack's result into every layer's keys and values (`lbksh`)."""
    project = lambda block: block.cross_attention.keys_and_values(memory_bsd)  # noqa: E731
    if isinstance(self.blocks, tuple):
      return tuple(project(block) for block in self.blocks)
    return jax.lax.map(project, self.blocks)

  def empty_cache(self, batch: int, slots: int) -> KVCache:
    """Makes room for `slots` positions of `batch` rows, in the compute dtype."""
    dims = self.config.dims
    zeros = jnp.zeros((batch, dims["k"], slots, dims["h"]), jnp.dtype(self.config.dtype))
    if isinstance(self.blocks, tuple):
      return tuple(KVCache(zeros, zeros) for _ in self.blocks)
    layers = count(self.blocks)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], layers, 0), KVCache(zeros, zeros))

  def _views(self, positions_bt, segments_bt, prefix_bt, cache) -> dict[str, View]:
    """What each kind of layer sees, made once for all layers."""
    config = self.config
    return {
      kind: View(
        self._mask(kind, positions_bt, segments_bt, prefix_bt, cache),
        self._rope(kind, positions_bt),
        self._bias(),
      )
      for kind in dict.fromkeys(config.attention.pattern)
    }

  def _mask(self, kind, positions_bt, segments_bt, prefix_bt, cache) -> Mask:
    rule = self.config.attention.rule(kind, self.causal)
    if cache is not None:
      # The prefix is the cache's: later queries see it too, however far away.
      mask = cache_mask(rule, positions_bt, cache.slots)
      return dataclasses.replace(mask, prefix_bs=cache.prefix_bs)
    return self_mask(rule, segments_bt, positions_bt, prefix_bt)

  def _rope(self, kind, positions_bt):
    position = self.config.position
    if position.kind != "rope":
      return None
    return rope_angles(positions_bt, position, self.config.dims["h"], local=kind == "window")

  def _bias(self) -> Bias | None:
    position = self.config.position
    if position.kind == "alibi":
      return Bias(slopes_n=jnp.asarray(alibi_slopes(self.config.heads), jnp.float32))
    if position.kind == "relative":
      return Bias(None, self.relative_in, position.max_distance, both_ways=not self.causal)
    return None


def _mark(prefix_bs, prefix_bt, positions_bt):
  """The cache's prefix with that of new positions in it."""
  rows = jnp.arange(len(positions_bt))[:, None]
  return prefix_bs.at[rows, positions_bt].set(prefix_bt)


def run_layers(blocks, x_btd, each, shared, config: ModelConfig):
  """Runs stacked blocks one after another, in cycles of the attention pattern.

  Args:
    blocks: a block whose every leaf has a leading `l`.
    x_btd: residual stream.
    each: (cache, source) of every layer, with a leading `l`, or None.
    shared: (views by kind of layer, positions_bt, source_view, dropout key), alike for all.
    config: pattern, scan and remat.
  Returns:
    (x_btd, caches).
  """
  pattern = config.attention.pattern
  if isinstance(blocks, tuple):
    return _apart(blocks, x_btd, each, shared, config)
  layers = count(blocks)
  rows = (blocks, each, jnp.arange(layers))
  scanned = layers // len(pattern) * len(pattern) if config.scan else 0
  made = []
  if scanned:
    bodies = [_body(kind, shared, config, scanned=True) for kind in pattern]
    x_btd, caches = _scan(bodies, x_btd, jax.tree.map(lambda leaf: leaf[:scanned], rows))
    made.append(caches)
  if scanned < layers:
    rest = jax.tree.map(lambda leaf: leaf[scanned:], rows) if scanned else rows
    bodies = [_body(kind, shared, config, scanned=False) for kind in pattern]
    x_btd, caches = _unrolled(bodies, x_btd, rest, layers - scanned)
    made.append(caches)
  return x_btd, made[0] if len(made) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *made)


def _body(kind, shared, config: ModelConfig, scanned: bool):
  """One layer of a kind: (x_btd, (block, (cache, source), number)) → (x_btd, cache)."""

  def body(x_btd, layer, shared):
    block, (cache, source), number = layer
    views, positions_bt, source_view, key = shared
    key = None if key is None else jax.random.fold_in(key, number)
    return block(x_btd, views[kind], positions_bt, cache, source, source_view, key)

  if config.remat != "none":
    policy = _POLICIES[config.remat]
    body = jax.checkpoint(body, policy=policy, prevent_cse=not scanned)
  return lambda x_btd, layer: body(x_btd, layer, shared)


def _apart(blocks: tuple, x_btd, each, shared, config: ModelConfig):
  """Layers and caches that are trees of their own: decoding then copies no weight and no cache."""
  caches, sources = each
  made = []
  for number, block in enumerate(blocks):
    kind = config.attention.pattern[number % len(config.attention.pattern)]
    own = tuple(None if part is None else part[number] for part in (caches, sources))
    body = _body(kind, shared, config, scanned=False)
    x_btd, cache = body(x_btd, (block, own, number))
    made.append(cache)
  return x_btd, tuple(made)


def run_some(blocks, x_btd, first, layers: int, shared, config: ModelConfig, numbers, remat: bool):
  """Runs a few stacked blocks that stand anywhere in the stack, as a pipeline's stage does.

  Args:
    blocks: as many blocks, with a leading axis; those beyond the stack's end do nothing.
    x_btd: residual stream.
    first: number of the first block, which may be known at run time alone.
    layers: blocks in the whole stack.
    shared: what `Stack.shared` made.
    config: pattern and remat.
    numbers: for each block, the numbers it may have, one for every virtual stage.
    remat: whether the config's remat is applied.
  Returns:
    x_btd.
  """
  pattern = config.attention.pattern
  config = config if remat else dataclasses.replace(config, remat="none")
  bodies = [_body(kind, shared, config, scanned=False) for kind in pattern]
  run = [lambda x, layer, body=body: body(x, layer)[0] for body in bodies]
  for place, block in enumerate(unstack(blocks, count(blocks))):
    number = first + place
    layer = (block, (None, None), number)
    kinds = {n % len(pattern) for n in numbers[place] if n < layers}
    if len(kinds) == 1:
      y_btd = run[kinds.pop()](x_btd, layer)
    else:
      y_btd = jax.lax.switch(number % len(pattern), run, x_btd, layer)
    real = all(n < layers for n in numbers[place])
    x_btd = y_btd if real else jnp.where(number < layers, y_btd, x_btd)
  return x_btd


def apart(model: nnx.Module, take=None) -> nnx.Module:
  """Takes a decoder's stacked layers apart, for decoding: same values, each layer by itself.

  Args:
    model: any kind with a `decoder` stack.
    take: `unstack`, or `views` outside of jit.
  Returns:
    A copy whose `decoder.blocks` is a tuple of blocks; its caches are tuples too.
  """
  decoder = copy.copy(model.decoder)
  layers = (take or unstack)(model.decoder.blocks, count(model.decoder.blocks))
  decoder.blocks = nnx.data(tuple(layers))
  model = copy.copy(model)
  model.decoder = decoder
  return model


def _scan(bodies, x_btd, rows):
  """One compiled cycle of the pattern, for all of them."""
  period = len(bodies)
  cycles = count(rows) // period

  def cycle(x_btd, group):
    return _unrolled(bodies, x_btd, group, period)

  groups = jax.tree.map(lambda leaf: leaf.reshape(cycles, period, *leaf.shape[1:]), rows)
  x_btd, caches = jax.lax.scan(cycle, x_btd, groups)
  return x_btd, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), caches)


def _unrolled(bodies, x_btd, rows, layers: int):
  """A copy of its body for every layer."""
  caches = []
  for number, layer in enumerate(unstack(rows, layers)):
    x_btd, cache = bodies[number % len(bodies)](x_btd, layer)
    caches.append(cache)
  return x_btd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def count(stacked) -> int:
  """Length of a stacked tree's leading axis."""
  return jax.tree.leaves(stacked)[0].shape[0]


def unstack(stacked, count: int) -> list:
  """Takes a tree apart along its leading axis; the gradient is one concatenation a leaf."""
  leaves, structure = jax.tree.flatten(stacked)
  columns = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [column[i].squeeze(0) for column in columns])
    for i in range(count)
  ]


def views(stacked, count: int) -> list:
  """Like `unstack`, of arrays on one CPU: what it returns shares their memory, where aligned."""
  rows = jax.tree.map(np.asarray, stacked)
  take = lambda i: jax.tree.map(lambda row: jax.device_put(row[i], may_alias=True), rows)  # noqa: E731
  return [take(i) for i in range(count)]
