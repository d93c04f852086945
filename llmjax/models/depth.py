"""Runs the layers of a stack, scanned or unrolled, with rematerialization."""

import copy
import dataclasses
import functools

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
    names_which_can_be_saved=[], names_which_can_be_offloaded=list(NAMES),
    offload_src="device", offload_dst="pinned_host",
  ),
}


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive layers with the same tree of weights; a stack is a tuple of groups.

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
    """The group of blocks whose first layer has the number `start`."""
    end = start + (len(blocks) if isinstance(blocks, tuple) else count(blocks))
    return cls(blocks, start, tuple((number,) for number in range(start, end)), end)

  @property
  def stacked(self) -> bool:
    """Whether leaves have a leading `l`."""
    return not isinstance(self.blocks, tuple)

  @property
  def layers(self) -> list:
    """The blocks, unstacked."""
    return unstack(self.blocks, len(self.candidates)) if self.stacked else list(self.blocks)


def run_layers(groups, x_btd, inputs: LayerInputs, config: ModelConfig, caches=None, sources=None):
  """Runs the groups of a stack.

  Stacked groups are scanned, in cycles of the attention pattern, if the config says so and there
  are no caches, which may differ in shape from layer to layer.

  Args:
    config: pattern, scan and remat.
    caches: of every layer by its number, or None.
    sources: keys and values of cross-attention, likewise.
  Returns:
    (x_btd, caches or None, routers' statistics [l, …] of the layers that have routers, or None).
  """
  new_caches, stats, period = [], [], len(config.attention.pattern)
  for group in groups:
    layers = len(group.candidates)
    scanned = layers // period * period if config.scan and group.stacked and not caches else 0
    if scanned:
      x_btd, scan_stats = _scan(group, scanned, x_btd, inputs, config)
      stats.append(scan_stats)
    # The layers after the last full cycle are unrolled.
    blocks = jax.tree.map(lambda leaf: leaf[scanned:], group.blocks) if scanned else group.blocks  # noqa: B023
    candidates, start = group.candidates[scanned:], group.start + scanned
    unrolled = dataclasses.replace(group, blocks=blocks, start=start, candidates=candidates)
    for i, block in enumerate(unrolled.layers if candidates else ()):
      arguments = (block, start + i, inputs, *(a and a[start + i] for a in (caches, sources)))
      x_btd, cache, layer_stats = _run_layer(config, candidates[i], group.end, x_btd, *arguments)
      new_caches.append(cache)
      stats.append(jax.tree.map(lambda a: a[None], layer_stats))
  stats = [each for each in stats if each is not None]
  stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
  return x_btd, tuple(new_caches) if caches else None, stats


def _run_layer(config, candidates, end: int, x_btd, block, number, *rest):
  """Runs an unrolled layer; its kind is selected at run time where its number is not known."""
  pattern = config.attention.pattern
  kinds = {n % len(pattern) for n in candidates if n < end}
  if len(kinds) == 1:
    layer = _layer(pattern[kinds.pop()], config)
  else:
    branches = [_layer(kind, config) for kind in pattern]
    layer = functools.partial(jax.lax.switch, number % len(pattern), branches)
  y_btd, cache, stats = layer(x_btd, block, number, *rest)
  if max(candidates) >= end:
    y_btd = jnp.where(number < end, y_btd, x_btd)
    stats = jax.tree.map(lambda a: jnp.where(number < end, a, 0), stats)
  return y_btd, cache, stats


def _layer(kind: str, config: ModelConfig, scanned: bool = False):
  """(x_btd, block, number, inputs, cache, source) → (x_btd, cache, stats), rematerialized."""

  def layer(x_btd, block, number, inputs, cache=None, source=None):
    if inputs.key is not None:
      inputs = dataclasses.replace(inputs, key=jax.random.fold_in(inputs.key, number))
    return block(x_btd, kind, inputs, cache, source)

  if config.remat == "none":
    return layer
  policy = _POLICIES.get(config.remat) or _policies.save_only_these_names(*config.remat.split("+"))
  return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def _scan(group: Group, layers: int, x_btd, inputs: LayerInputs, config: ModelConfig):
  """Scans a group's first layers, a cycle of the pattern at a time: (x_btd, stats [l, …])."""
  pattern = config.attention.pattern
  period = len(pattern)
  cycle = [_layer(pattern[(group.start + i) % period], config, scanned=True) for i in range(period)]

  def run_cycle(x_btd, blocks_and_numbers):
    blocks, numbers = blocks_and_numbers
    stats = []
    for layer, block, number in zip(cycle, unstack(blocks, period), numbers, strict=True):
      x_btd, _, layer_stats = layer(x_btd, block, number, inputs)
      stats.append(layer_stats)
    return x_btd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

  cycles = jax.tree.map(
    lambda leaf: leaf[:layers].reshape(layers // period, period, *leaf.shape[1:]),
    (group.blocks, group.start + jnp.arange(layers)),
  )
  x_btd, stats = jax.lax.scan(run_cycle, x_btd, cycles)
  return x_btd, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)


def unstack_layers(model: nnx.Module, take=None) -> nnx.Module:
  """Copies a model with a decoder of one group, a tuple of blocks, for decoding.

  Args:
    model: any kind with a `decoder` stack.
    take: `unstack`, or `views` outside of jit.
  """
  model, decoder, layers = copy.copy(model), copy.copy(model.decoder), []
  for name, group in decoder.named_groups:
    layers += (take or unstack)(group.blocks, len(group.candidates))
    setattr(decoder, name, nnx.data(()))
  decoder.blocks, model.decoder = nnx.data(tuple(layers)), decoder
  return model


def count(stacked) -> int:
  """Length of a stacked tree's leading axis."""
  return jax.tree.leaves(stacked)[0].shape[0]


def unstack(stacked, count: int) -> list:
  """Splits a tree along its leading axis; the gradient is one concatenation a leaf."""
  leaves, structure = jax.tree.flatten(stacked)
  split = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
  return [structure.unflatten([each[i].squeeze(0) for each in split]) for i in range(count)]


def views(stacked, count: int) -> list:
  """Like `unstack`, of arrays on one CPU; the result shares their memory, where aligned."""
  arrays = jax.tree.map(np.asarray, stacked)
  take = lambda i: jax.tree.map(lambda a: jax.device_put(a[i], may_alias=True), arrays)  # noqa: E731
  return [take(i) for i in range(count)]
