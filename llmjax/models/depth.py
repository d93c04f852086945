"""Runs the layers of a stack, scanned or one by one, with rematerialization."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.models.block import LayerInputs
from llmjax.models.config import ModelConfig
from llmjax.nn.dropout import NAMES

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


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive layers with alike weights; a stack is a tuple of groups.

  Attributes:
    blocks: a block whose every leaf has a leading `l`, or a tuple of blocks (for decoding).
    start: number of the first layer in the stack; in a pipeline's stage a traced one.
    candidates: for each layer the numbers it may have: more than one in a pipeline's stage.
    end: layers of the stack; layers with this number or a higher one do nothing.
  """

  blocks: object
  start: int | jax.Array
  candidates: tuple[tuple[int, ...], ...]
  end: int

  @classmethod
  def of(cls, blocks, start: int) -> "Group":
    """The group of blocks that begins at a layer."""
    end = start + (len(blocks) if isinstance(blocks, tuple) else count(blocks))
    return cls(blocks, start, tuple((number,) for number in range(start, end)), end)

  @property
  def stacked(self) -> bool:
    """Whether leaves have a leading `l`."""
    return not isinstance(self.blocks, tuple)

  @property
  def layers(self) -> list:
    """The blocks one by one."""
    return unstack(self.blocks, len(self.candidates)) if self.stacked else list(self.blocks)


def run_layers(groups, x_btd, inputs: LayerInputs, config: ModelConfig, caches=None, sources=None):
  """Runs the groups of a stack one after another.

  Stacked groups are scanned, in cycles of the attention pattern, if the config says so and there
  are no caches, which may differ in shape from layer to layer.

  Args:
    groups: of type `Group`.
    x_btd: residual stream.
    inputs: the same for all layers.
    config: pattern, scan and remat.
    caches: of every layer by its number, or None.
    sources: keys and values of cross attention, likewise.
  Returns:
    (x_btd, caches or None, routers' statistics [l, …] of the layers that have routers, or None).
  """
  new_caches, stats, period = [], [], len(config.attention.pattern)
  for group in groups:
    layers = len(group.candidates)
    scanned = layers // period * period if config.scan and group.stacked and not caches else 0
    if scanned:
      x_btd, found = _scan(group, scanned, x_btd, inputs, config)
      stats.append(found)
      blocks = jax.tree.map(lambda leaf: leaf[scanned:], group.blocks)  # noqa: B023
      group = dataclasses.replace(
        group, blocks=blocks, start=group.start + scanned, candidates=group.candidates[scanned:]
      )
    layer_stats = []
    for place, block in enumerate(group.layers if group.candidates else ()):
      number = group.start + place
      rest = [arrays and arrays[number] for arrays in (caches, sources)]
      x_btd, cache, found = _run_layer(group, place, x_btd, block, number, inputs, config, rest)
      new_caches.append(cache)
      layer_stats += [] if found is None else [jax.tree.map(lambda a: a[None], found)]
    stats += layer_stats
  stats = [found for found in stats if found is not None]
  stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
  return x_btd, tuple(new_caches) if caches else None, stats


def _run_layer(group: Group, place: int, x_btd, block, number, inputs, config, rest):
  """Runs one layer that is not scanned: (x_btd, cache, statistics)."""
  pattern, candidates = config.attention.pattern, group.candidates[place]
  kinds = {n % len(pattern) for n in candidates if n < group.end}
  if len(kinds) == 1:
    layer = _layer(pattern[kinds.pop()], config)
    y_btd, cache, stats = layer(x_btd, block, number, inputs, *rest)
  else:
    branches = [_layer(kind, config) for kind in pattern]
    y_btd, cache, stats = jax.lax.switch(
      number % len(pattern), branches, x_btd, block, number, inputs, *rest
    )
  if max(candidates) >= group.end:
    y_btd = jnp.where(number < group.end, y_btd, x_btd)
    stats = jax.tree.map(lambda a: jnp.where(number < group.end, a, 0), stats)
  return y_btd, cache, stats


def _layer(kind: str, config: ModelConfig, scanned: bool = False):
  """A layer of a kind: (x_btd, block, number, inputs, cache, source) → (x_btd, cache, stats)."""

  def layer(x_btd, block, number, inputs, cache=None, source=None):
    if inputs.key is not None:
      inputs = dataclasses.replace(inputs, key=jax.random.fold_in(inputs.key, number))
    return block(x_btd, kind, inputs, cache, source)

  if config.remat == "none":
    return layer
  named = _policies.save_only_these_names(*config.remat.split("+"))
  policy = _POLICIES.get(config.remat, named)
  return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def _scan(group: Group, layers: int, x_btd, inputs: LayerInputs, config: ModelConfig):
  """Scans a group's first layers, a cycle of the pattern at a time: (x_btd, stats [l, …])."""
  pattern = config.attention.pattern
  period = len(pattern)
  cycle = [_layer(pattern[(group.start + i) % period], config, scanned=True) for i in range(period)]

  def run_cycle(x_btd, rows):
    blocks, numbers = rows
    stats = []
    for layer, block, number in zip(cycle, unstack(blocks, period), numbers, strict=True):
      x_btd, _, found = layer(x_btd, block, number, inputs)
      stats.append(found)
    return x_btd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

  rows = jax.tree.map(
    lambda leaf: leaf[:layers].reshape(layers // period, period, *leaf.shape[1:]),
    (group.blocks, group.start + jnp.arange(layers)),
  )
  x_btd, stats = jax.lax.scan(run_cycle, x_btd, rows)
  return x_btd, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)


def unstack_layers(model: nnx.Module, take=None) -> nnx.Module:
  """Gives a decoder every layer by itself, for decoding: the same values in other arrays.

  Args:
    model: any kind with a `decoder` stack.
    take: `unstack`, or `views` outside of jit.
  Returns:
    A copy whose decoder has one group, a tuple of blocks.
  """
  decoder, layers = copy.copy(model.decoder), []
  for name, group in decoder.named_groups:
    layers += (take or unstack)(group.blocks, len(group.candidates))
    setattr(decoder, name, nnx.data(()))
  decoder.blocks = nnx.data(tuple(layers))
  model = copy.copy(model)
  model.decoder = decoder
  return model


def count(stacked) -> int:
  """Length of a stacked tree's leading axis."""
  return jax.tree.leaves(stacked)[0].shape[0]


def unstack(stacked, count: int) -> list:
  """Splits a tree along its leading axis; the gradient is one concatenation a leaf."""
  leaves, structure = jax.tree.flatten(stacked)
  columns = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [column[i].squeeze(0) for column in columns])
    for i in range(count)
  ]


def views(stacked, count: int) -> list:
  """Like `unstack`, of arrays on one CPU: what it returns shares their memory, where aligned."""
  arrays = jax.tree.map(np.asarray, stacked)
  take = lambda i: jax.tree.map(lambda a: jax.device_put(a[i], may_alias=True), arrays)  # noqa: E731
  return [take(i) for i in range(count)]
