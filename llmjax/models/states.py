"""Looks into a text model: the residual stream after each block, and the weights of attention.

Blocks run one after another, each a call of the same compiled function, and one block's weights
are taken out of a stack at a time: also a large model fits.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.block import Block, LayerInputs


def hidden_states(model: nnx.Module, batch: Batch, layers: Sequence[int]):
  """Computes the residual stream between blocks.

  Args:
    model: a decoder or an encoder.
    batch: [b, t].
    layers: 0 is the embedded tokens, i the result of block i; negative ones count from the end.
  Returns:
    x_lbtd, one for each of `layers`, in the compute dtype; the last block's is not normed.
  Raises:
    UserError: there is no such layer.
  """
  wanted, found = _numbers(layers, model.config.layers + 1), {}
  for number, x_btd, *_ in _blocks(model, batch):
    if number in wanted:
      found[number] = x_btd
  return jnp.stack([found[number] for number in wanted])


def attention_maps(model: nnx.Module, batch: Batch, layers: Sequence[int] | None = None):
  """Computes the weights with which each query attends to each key.

  Args:
    model: a decoder or an encoder.
    batch: [b, t].
    layers: blocks, from 0; None: all of them.
  Returns:
    weights_lbnts, fp32, one [b, n, t, s] for each of `layers`. Each row sums to 1 (with a sink, to
    less).
  Raises:
    UserError: there is no such layer.
  """
  layers = range(model.config.layers) if layers is None else layers
  wanted, found = _numbers(layers, model.config.layers), {}
  for number, x_btd, block, kind, inputs in _blocks(model, batch):
    if number in wanted:
      found[number] = _weights(block, x_btd, kind, inputs)
  return jnp.stack([found[number] for number in wanted])


def _numbers(layers: Sequence[int], count: int) -> list[int]:
  """Layers counted from the beginning."""
  for layer in layers:
    if not -count <= layer < count:
      raise UserError(f"there is no layer {layer}; layers are numbered from 0 to {count - 1}")
  return [layer % count for layer in layers]


def _blocks(model: nnx.Module, batch: Batch) -> Iterator[tuple]:
  """Yields (number, x_btd, block, kind, inputs) before each block, the last block None."""
  number, pattern = 0, model.config.attention.pattern
  x_btd, inputs = _start(model, batch)
  for group in model.stack.groups:
    for i in range(len(group.candidates)):
      block = jax.tree.map(lambda leaf: leaf[i], group.blocks) if group.stacked else group.blocks[i]  # noqa: B023
      kind = pattern[number % len(pattern)]
      yield number, x_btd, block, kind, inputs
      x_btd, number = _run(block, x_btd, kind, inputs), number + 1
  yield number, x_btd, None, "", inputs


@jax.jit
def _start(model: nnx.Module, batch: Batch):
  return model.embed_tokens(batch), model.layer_inputs(batch)


@functools.partial(jax.jit, static_argnames="kind")
def _run(block: Block, x_btd, kind: str, inputs: LayerInputs):
  return block(x_btd, kind, inputs)[0]


@functools.partial(jax.jit, static_argnames="kind")
def _weights(block: Block, x_btd, kind: str, inputs: LayerInputs):
  return block.attention_weights(x_btd, kind, inputs)
