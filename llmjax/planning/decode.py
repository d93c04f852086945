"""Serving for a mesh that is not there: prefill and one decoding step, with no weights."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.depth import unstack_layers
from llmjax.parallel.rules import (
  ACTIVATIONS,
  batch_sharding,
  check_divides,
  spec,
  weight_shardings,
)
from llmjax.serve.decoding import decode, prefill
from llmjax.training.config import Config


def check_decodes(config: Config, mesh: Mesh | AbstractMesh):
  """Raises a `UserError` where a model writes no text, or a mesh does not divide it or its rows."""
  if config.model.kind != "decoder":
    raise UserError(f"--decode wants model.kind=decoder, not {config.model.kind}")
  check_divides(mesh, "batch", "b", (config.data.batch_size,), ACTIVATIONS)
  weight_shardings(mesh, abstract(config.model))


def serving_program(program: str, config: Config, mesh: Mesh):
  """Describes what `generate` runs, weights in the compute dtype and laid out as in training.

  Args:
    program: prefill, of `data.batch_size` prompts as long as the context; or decode, one token of
      as many rows, whose cache has a slot for each position of the context.
    config: the experiment, `model.vocab_size` filled in.
    mesh: of the devices to compile for.
  Returns:
    (jitted function, its abstract arguments), to be lowered on the mesh; decode's cache is donated.
  Raises:
    UserError: the model writes no text, or the mesh does not divide rows or weights.
  """
  model, rows = config.model, config.data.batch_size
  check_decodes(config, mesh)
  place = batch_sharding(mesh)
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)  # noqa: E731
  prompts = Batch(ids(rows, model.max_seq_len), segments_bt=ids(rows, model.max_seq_len))
  start = _weights(model, mesh), prompts, ids(rows)

  def read(weights, batch, lengths):
    return prefill(weights, batch, lengths, model.max_seq_len)

  with jax.set_mesh(mesh):
    cache = jax.tree.map(lambda leaf: _placed(leaf, mesh), jax.eval_shape(read, *start)[1])
  if program == "prefill":
    places = place, jax.tree.map(lambda leaf: leaf.sharding, cache)
    return jax.jit(read, out_shardings=places), start
  one = Batch(ids(rows, 1), positions_bt=ids(rows, 1))
  return jax.jit(decode, donate_argnums=2), (start[0], one, cache)


def _weights(model: ModelConfig, mesh: Mesh):
  """The model as decoding reads it, every layer by itself."""
  layers = jax.eval_shape(unstack_layers, abstract(model))
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=place),
    layers, weight_shardings(mesh, layers),
  )


def _placed(leaf, mesh: Mesh):
  """A layer's keys or values [b, k, s, h]: rows are cut, and heads if there are enough of them."""
  whole = leaf.ndim < 4 or leaf.shape[1] % mesh.shape["tensor"]
  letters = "b" if whole else "bk"
  place = NamedSharding(mesh, spec(letters, ACTIVATIONS))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
