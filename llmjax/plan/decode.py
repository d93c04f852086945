"""Serving for a mesh that is not there: prefill and one decoding step, lowered with no weights."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.depth import apart
from llmjax.parallel.rules import ACTIVATIONS, batch_sharding, spec, weight_shardings
from llmjax.serve.generate import decode, prefill
from llmjax.train.config import Config

PROGRAMS = ("prefill", "decode")


def lower_serving(program: str, config: Config, mesh: Mesh):
  """Lowers what `generate` runs, weights in the compute dtype and laid out as in training.

  Args:
    program: prefill, of `data.batch_size` prompts as long as the context; or decode, one token of
      as many rows, whose cache has a slot for each position of the context.
    config: the experiment, `model.vocab_size` filled in.
    mesh: of the devices to compile for.
  Returns:
    jax's lowered program; decode's cache is donated.
  Raises:
    UserError: the model writes no text, or the mesh does not divide rows or weights.
  """
  model, rows = config.model, config.data.batch_size
  if model.kind != "decoder":
    raise UserError(f"--decode wants model.kind=decoder, not {model.kind}")
  weights = _weights(model, mesh)
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))  # noqa: E731
  start = Batch(ids(rows, model.context)), ids(rows), model.context

  def read(weights, batch, lengths):
    return prefill(weights, batch, lengths, model.context)

  with jax.set_mesh(mesh):
    logits_bv, cache = jax.eval_shape(read, weights, *start[:2])
    cache = jax.tree.map(lambda leaf: _placed(leaf, mesh), cache)
    if program == "prefill":
      places = (logits_bv.sharding, jax.tree.map(lambda leaf: leaf.sharding, cache))
      return jax.jit(read, out_shardings=places).lower(weights, *start[:2])
    one = Batch(ids(rows, 1), positions_bt=ids(rows, 1))
    return jax.jit(decode, donate_argnums=2).lower(weights, one, cache)


def _weights(model: ModelConfig, mesh: Mesh):
  """The model as decoding reads it, every layer by itself."""
  layers = jax.eval_shape(apart, abstract(model))
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
