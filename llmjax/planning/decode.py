"""Serving on a mesh that is not at hand: prefill and one decoding step, without weights."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.model import decoding_weights
from llmjax.parallel.rules import batch_sharding, check_divides, spec, weight_shardings
from llmjax.serve.state import empty_state, prefill, step
from llmjax.training.config import Config


def check_decodes(config: Config, mesh: Mesh | AbstractMesh):
  """Raises a `UserError` where a model writes no text, or a mesh does not divide it or its rows."""
  if config.model.kind != "decoder":
    raise UserError(f"--decode wants model.kind=decoder, not {config.model.kind}")
  check_divides(mesh, "batch", "b", (config.data.batch_size,))
  weight_shardings(mesh, abstract(config.model))


def serving_program(program: str, config: Config, mesh: Mesh):
  """Describes what `generate` runs, weights in the compute dtype and sharded as in training.

  Args:
    program: prefill, of `data.batch_size` prompts as long as the context; or decode, one token of
      as many rows, whose cache has a slot for each position of the context.
    config: the experiment, `model.vocab_size` filled in.
    mesh: of the devices to compile for.
  Returns:
    (jitted function, its abstract arguments), to be lowered on the mesh; decode's state is donated.
  Raises:
    UserError: the model writes no text, or the mesh does not divide rows or weights.
  """
  model, rows, slots = config.model, config.data.batch_size, config.model.max_seq_len
  check_decodes(config, mesh)
  weights = jax.eval_shape(decoding_weights, abstract(model))
  weights = jax.tree.map(_sharded, weights, weight_shardings(mesh, weights))
  place = batch_sharding(mesh)
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)  # noqa: E731
  prompts = Batch(ids(rows, slots), segments_bt=ids(rows, slots))
  with jax.set_mesh(mesh):
    state = jax.eval_shape(lambda weights: empty_state(weights, rows, slots), weights)

  def place_of(leaf) -> NamedSharding:  # of rows, and of keys' heads if there are enough
    lone = leaf.ndim < 4 or leaf.shape[1] % mesh.shape["tensor"]
    return NamedSharding(mesh, spec("b" if lone else "bk"))

  state = jax.tree.map(lambda leaf: _sharded(leaf, place_of(leaf)), state)
  if program == "prefill":
    read = functools.partial(prefill, slots=slots)
    return jax.jit(read), (weights, prompts, state.sampling, ids(rows))
  return jax.jit(step, donate_argnums=1), (weights, state)


def _sharded(leaf, place):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
