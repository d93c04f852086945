"""How depth is run: layers scanned, unrolled, apart, a few at a time; and what is recomputed."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable

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


def run_layers(blocks, x_btd, each, shared: LayerInputs, config: ModelConfig, first: int = 0):
  """Runs stacked blocks one after another, in cycles of the attention pattern.

  Args:
    blocks: a block whose every leaf has a leading `l`.
    x_btd: residual stream.
    each: (cache, source) of every layer, with a leading `l`, or None.
    shared: alike for all.
    config: pattern, scan and remat.
    first: number of the first block in its stack.
  Returns:
    (x_btd, (caches, what routers did)).
  """
  pattern = _from(config.attention.pattern, first)
  bodies = [_body(kind, shared, config) for kind in pattern]
  if isinstance(blocks, tuple):  # decoding then copies no weight and no cache
    own = zip(*(part or (None,) * len(blocks) for part in each), strict=True)
    x_btd, made = _in_turn(bodies, x_btd, zip(blocks, own, range(len(blocks)), strict=True))
    return x_btd, tuple(zip(*made, strict=True))
  layers = count(blocks)
  rows = (blocks, each, first + jnp.arange(layers))
  scanned = layers // len(pattern) * len(pattern) if config.scan else 0
  made = []
  if scanned:
    cycle = [_body(kind, shared, config, scanned=True) for kind in pattern]
    x_btd, kept = _scan(cycle, x_btd, jax.tree.map(lambda leaf: leaf[:scanned], rows))
    made.append(kept)
  if scanned < layers:
    rest = jax.tree.map(lambda leaf: leaf[scanned:], rows) if scanned else rows
    x_btd, kept = _unrolled(bodies, x_btd, rest, layers - scanned)
    made.append(kept)
  return x_btd, made[0] if len(made) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *made)


def _from(pattern: tuple, first: int) -> tuple:
  """The kinds of layers from number `first` on."""
  first %= len(pattern)
  return pattern[first:] + pattern[:first]


def _body(kind, shared: LayerInputs, config: ModelConfig, scanned: bool = False):
  """One layer of a kind: (x_btd, (block, (cache, source), number)) → (x_btd, (cache, routing))."""

  def body(x_btd, layer, shared):
    block, (cache, source), number = layer
    if shared.key is not None:
      shared = dataclasses.replace(shared, key=jax.random.fold_in(shared.key, number))
    x_btd, *made = block(x_btd, kind, shared, cache, source)
    return x_btd, tuple(made)

  if config.remat != "none":
    named = _policies.save_only_these_names(*config.remat.split("+"))
    policy = _POLICIES.get(config.remat, named)
    body = jax.checkpoint(body, policy=policy, prevent_cse=not scanned)
  return lambda x_btd, layer: body(x_btd, layer, shared)


def run_some(
  blocks, x_btd, first, layers: int, shared, config: ModelConfig, numbers, remat: bool,
  before: int = 0,
):
  """Runs a few stacked blocks that stand anywhere in the stack, as a pipeline's stage does.

  Args:
    blocks: as many blocks, with a leading axis; those beyond the stack's end do nothing.
    x_btd: residual stream.
    first: number of the first block, which may be known at run time alone.
    layers: blocks that are stacked.
    shared: what `Stack.shared` made.
    config: pattern and remat.
    numbers: for each block, the numbers it may have, one for every virtual stage.
    remat: whether the config's remat is applied.
    before: layers of the stack that are not among these blocks.
  Returns:
    (x_btd, what routers did).
  """
  pattern = _from(config.attention.pattern, before)
  config = config if remat else dataclasses.replace(config, remat="none")
  bodies = [_body(kind, shared, config) for kind in pattern]
  made = []
  for place, block in enumerate(unstack(blocks, count(blocks))):
    number = first + place
    layer = (block, (None, None), before + number)
    kinds = {n % len(pattern) for n in numbers[place] if n < layers}
    if len(kinds) == 1:
      y_btd, (_, routing) = bodies[kinds.pop()](x_btd, layer)
    else:
      y_btd, (_, routing) = jax.lax.switch(number % len(pattern), bodies, x_btd, layer)
    if not all(n < layers for n in numbers[place]):
      y_btd = jnp.where(number < layers, y_btd, x_btd)
      routing = jax.tree.map(lambda a: jnp.where(number < layers, a, 0), routing)  # noqa: B023
    x_btd = y_btd
    made.append(routing)
  return x_btd, jax.tree.map(lambda *a: jnp.stack(a), *made)


def unstack_layers(model: nnx.Module, take=None) -> nnx.Module:
  """Takes a decoder's stacked layers apart, for decoding: same values, each layer by itself.

  Args:
    model: any kind with a `decoder` stack.
    take: `unstack`, or `views` outside of jit.
  Returns:
    A copy whose `decoder.blocks` is a tuple of blocks; its caches are tuples too.
  """
  decoder = copy.copy(model.decoder)
  groups = [group for group in (decoder.first, decoder.blocks) if group != ()]
  layers = [layer for group in groups for layer in (take or unstack)(group, count(group))]
  decoder.first, decoder.blocks = nnx.data(()), nnx.data(tuple(layers))
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
  x_btd, made = jax.lax.scan(cycle, x_btd, groups)
  return x_btd, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), made)


def _unrolled(bodies, x_btd, rows, layers: int):
  """A copy of its body for every layer of a stack."""
  x_btd, made = _in_turn(bodies, x_btd, unstack(rows, layers))
  return x_btd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def _in_turn(bodies, x_btd, layers: Iterable):
  """One layer after another: (x_btd, what each made)."""
  made = []
  for body, layer in zip(itertools.cycle(bodies), layers, strict=False):
    x_btd, kept = body(x_btd, layer)
    made.append(kept)
  return x_btd, made


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
