"""The two tables that turn letters into partition specs; the only place that knows both.

Model code writes `shard(x_btd, "btd")` and names its weights `up_df`; which mesh axis a letter is
cut along is decided here alone.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core import tree
from llmjax.core.dims import LETTERS, letters_of
from llmjax.core.errors import UserError

WEIGHTS = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}
ACTIVATIONS = {"b": ("data", "fsdp"), "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}


def spec(letters: str, table: dict) -> PartitionSpec:
  """Looks letters up in a table: `spec("df", WEIGHTS)` is `P("fsdp", "tensor")`."""
  return PartitionSpec(*(table.get(letter) for letter in letters))


def shard(x, letters: str):
  """Constrains an activation to the layout of its letters; without a mesh in scope, leaves it.

  Args:
    x: activation, one letter a dimension.
    letters: its letters, such as `btd`.
  Returns:
    `x`, same values.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(letters, ACTIVATIONS))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Where a batch's arrays [b, t] live."""
  return NamedSharding(mesh, spec("bt", ACTIVATIONS))


def state_shardings(mesh: Mesh, state):
  """Gives every leaf of a tree of weights (or of anything named like them) its sharding.

  Args:
    mesh: the run's mesh.
    state: tree of arrays or `ShapeDtypeStruct`s whose paths end in `_letters`.
  Returns:
    The tree with a `NamedSharding` at every leaf.
  Raises:
    UserError: a dimension is not a multiple of the mesh axes it is cut along.
  """

  def sharding(path, leaf):
    letters = letters_of(path, len(leaf.shape))
    check_divides(mesh, path, letters, leaf.shape, WEIGHTS)
    return NamedSharding(mesh, spec(letters, WEIGHTS))

  return tree.map_with_path(sharding, state)


def optimizer_shardings(mesh: Mesh, optimizer, model):
  """Lays optimizer state out like the weights it belongs to; small counters live everywhere.

  Args:
    mesh: the run's mesh.
    optimizer: tree of optax state; a moment's path ends in its weight's path.
    model: the tree of weights.
  Returns:
    The tree with a `NamedSharding` at every leaf.
  Raises:
    UserError: an array of more than 1,024 numbers that belongs to no weight.
  """
  weights = tree.flatten(state_shardings(mesh, model))

  def sharding(path, leaf):
    parts = path.split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    owner = next((tail for tail in tails if tail in weights), None)
    if owner is None and math.prod(leaf.shape) > 1024:
      raise UserError(f"optimizer state {path!r} of shape {leaf.shape} belongs to no weight")
    return weights[owner] if owner else NamedSharding(mesh, PartitionSpec())

  return tree.map_with_path(sharding, optimizer)


def check_divides(mesh: Mesh, name: str, letters: str, shape, table: dict):
  """Raises a `UserError` naming array, letter, size and axes where the mesh does not divide."""
  for letter, size in zip(letters, shape, strict=True):
    axes = table.get(letter) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if size % ways:
      raise UserError(
        f"{name!r} has {size} {LETTERS[letter]} ({letter!r}), which mesh "
        f"{' × '.join(f'{axis} {mesh.shape[axis]}' for axis in axes)} does not divide"
      )
