"""The two tables that turn letters into partition specs; the only place that knows both. Model code
writes `shard(x_btd, "btd")` and names its weights `up_df`; which mesh axis a letter is sharded over
is decided here."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core import tree
from llmjax.core.dims import LETTERS, letters_of
from llmjax.core.errors import UserError
from llmjax.core.weight import ShardedWeight, ShardSpec, is_sharded

_TENSOR = dict.fromkeys("nkfv", "tensor")
WEIGHTS = {"l": "stage", **_TENSOR, "e": "expert", "d": "fsdp", "r": "fsdp"}
ACTIVATIONS = {"b": ("data", "fsdp", "expert"), "t": "context", **_TENSOR, "e": "expert"}
REPLICATED = {letter: axis for letter, axis in WEIGHTS.items() if axis != "fsdp"}
REPLICATED_BYTES = 64_000_000  # a larger weight must be sharded on a mesh that shards any
# By `train.zero_stage` the layout of weights; 1 shards optimizer state, 2 gradients, 3 weights too.
ZERO = {1: REPLICATED, 2: REPLICATED, 3: WEIGHTS}


class LayoutError(UserError):
  """The rules do not shard what the mesh says they should."""


def spec(
  letters: str, table: dict = ACTIVATIONS, shape: Sequence[int] = (), mesh: Mesh | None = None
) -> PartitionSpec:
  """Looks letters up in a table: `spec("df", WEIGHTS)` is `P("fsdp", "tensor")`.

  An axis shards the first letter that names it: `spec("dr", WEIGHTS)` is `P("fsdp", None)`. With a
  shape, what `_axes_for` says is replicated; `mesh` is by default the one in scope.
  """
  entries, taken = [], set()
  for letter, size in itertools.zip_longest(letters, shape):
    axes = set(_axes_for(letter, size, table, mesh))
    entries.append(table[letter] if axes and not axes & taken else None)
    taken |= axes
  return PartitionSpec(*entries)


def _axes_for(letter: str, size: int | None, table: dict, mesh: Mesh | None) -> tuple[str, ...]:
  """The axes that shard a dimension of this size (None: any). Replicated are widths of one, the
  scales of a weight whose inputs are one block, and key heads of which `tensor` wants copies."""
  if size == 1 and letter in "df":
    return ()
  return () if letter == "k" and size and key_copies(size, mesh) > 1 else axes_of(letter, table)


def key_copies(k: int, mesh: Mesh | None = None) -> int:
  """How many devices of `tensor` share a key head: more than 1 where they are a multiple of k.

  Weights of key and value heads are then replicated over `tensor`, and each head is copied for the
  devices whose queries read it.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  tensor = 1 if mesh.empty or inside("tensor") else mesh.shape["tensor"]
  return tensor // k if tensor > k and tensor % k == 0 else 1


def shard(x, letters: str):
  """Constrains an activation to the layout of its letters; without a mesh in scope, leaves it.

  Inside a `shard_map` over all axes it is each device's own already.

  Raises:
    UserError: a dimension is not a multiple of the mesh axes it is sharded over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or inside("fsdp"):
    return x
  check_divides(mesh, f"activation {letters}", letters, x.shape)
  return jax.lax.with_sharding_constraint(x, spec(letters, shape=x.shape))


def shard_stream(x_btd):
  """Constrains the residual stream between blocks: positions are sharded over `tensor` as well.

  Norms, dropout and sums of the stream are then done once, and the all-reduce after a block's half
  becomes a reduce-scatter. Positions that `tensor` does not divide are replicated over it.

  Source: sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x_btd
  return jax.lax.with_sharding_constraint(x_btd, stream_spec(x_btd.shape[1]))


def stream_spec(positions: int) -> PartitionSpec:
  """How the residual stream of rows of so many positions lies on the mesh in scope."""
  mesh = jax.sharding.get_abstract_mesh()
  uneven = positions % (shards("t") * mesh.shape["tensor"])
  t = "context" if uneven else ("context", "tensor")
  return spec("btd", ACTIVATIONS | {"t": t})


def shards(letter: str, table: dict = ACTIVATIONS) -> int:
  """Counts the shards of a letter's dimension on the mesh in scope; 1 without one.

  Axes of a `shard_map` that this is inside of do not count.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = () if mesh.empty else axes_of(letter, table)
  return math.prod(mesh.shape[axis] for axis in axes if not inside(axis))


def inside(axis: str) -> bool:
  """Whether what is traced runs on each device of an axis by itself, in a `shard_map` over it."""
  return axis in jax.sharding.get_abstract_mesh().manual_axes


def on_each_device(function: Callable, in_specs, out_specs, *axes: str):
  """A `shard_map` over these axes, by default over all that this is not inside of."""
  names = axes or (axis for axis in jax.sharding.get_abstract_mesh().axis_names if not inside(axis))
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, axis_names=set(names), check_vma=False
  )


def axes_of(letter: str, table: dict = ACTIVATIONS) -> tuple[str, ...]:
  """Names the mesh axes that a letter is sharded over."""
  axes = table.get(letter) or ()
  return (axes,) if isinstance(axes, str) else axes


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a batch's arrays [b, …]: examples only; positions are sharded inside the step."""
  return NamedSharding(mesh, spec("b"))


def weight_shardings(mesh: Mesh, model, table: dict = WEIGHTS):
  """Gives every leaf of a tree of weights (or of anything named like them) its sharding.

  Layers that `stage` does not divide are sharded along the residual width instead, so that each
  device still holds its share.

  Args:
    model: tree of arrays or `ShapeDtypeStruct`s whose paths end in `_letters`.
    table: from letters to axes.
  Returns:
    The tree with a `NamedSharding` at every leaf.
  Raises:
    UserError: a dimension is not a multiple of the mesh axes it is sharded over.
  """

  def sharding(path, leaf):
    return _sharding(mesh, path, letters_of(path, len(leaf.shape)), leaf.shape, table)

  return tree.map_with_path(sharding, model)


def _sharding(mesh: Mesh, path: str, letters: str, shape, table: dict) -> NamedSharding:
  if letters[:1] == "l" and shape[0] % mesh.shape["stage"]:
    table = table | {"l": None, "d": (*axes_of("d", table), "stage")}
  check_divides(mesh, path, letters, shape, table)
  return NamedSharding(mesh, spec(letters, table, shape, mesh))


def shard_weights(weights, table: dict, reduce_dtype: str = "float32"):
  """Makes a `ShardedWeight` of every matrix that `fsdp` cuts by a table, on the mesh in scope.

  Products that are written by hand then gather it a layer at a time, and reduce-scatter its
  gradient in the dtype given. Everything else is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape["fsdp"] == 1:
    return weights

  def one(path, leaf):
    letters = letters_of(path, leaf.ndim)
    axes = spec(letters, table, leaf.shape)
    if len(letters.removeprefix("l")) < 2 or "fsdp" not in axes:
      return leaf
    place = ShardSpec("fsdp", axes.index("fsdp") - len(letters), reduce_dtype)
    return ShardedWeight(leaf, place, letters.removeprefix("l"))

  return tree.map_with_path(one, weights)


def weight_specs(weights: dict) -> dict:
  """Partition specs of weights that enter a `shard_map` over all axes.

  Args:
    weights: weights of any kind by name; the name ends in the letters.
  Returns:
    The tree with a `PartitionSpec` for every array; `fsdp` cuts those of a `ShardedWeight` alone.
  """

  def specs(path, leaf):
    sharded = is_sharded(leaf)
    letters = leaf.letters if sharded else letters_of(path, leaf.ndim)
    one = spec(letters, WEIGHTS if sharded else REPLICATED, leaf.shape)
    return dataclasses.replace(leaf, array=one) if sharded else one

  return tree.map_with_path(specs, weights, is_leaf=is_sharded)


def has_sharded(weights) -> bool:
  """Whether any of the weights has to be gathered over `fsdp`."""
  return any(map(is_sharded, jax.tree.leaves(weights, is_leaf=is_sharded)))


def constrain(weights, table: dict):
  """Constrains a tree named like the weights to the layout of a table, on the mesh in scope."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return weights
  return jax.lax.with_sharding_constraint(weights, weight_shardings(mesh, weights, table))


def optimizer_shardings(mesh: Mesh, optimizer, model):
  """Shards optimizer state as the weights it belongs to; small counters are replicated.

  A factored moment has fewer dimensions than its weight and gets the letters of those it has.

  Args:
    optimizer: tree of optax state; a moment's path ends in its weight's path.
  Returns:
    The tree with a `NamedSharding` at every leaf.
  Raises:
    UserError: an array of more than 1,024 numbers that belongs to no weight.
  """
  weights = tree.flatten(model)

  def sharding(path, leaf):
    parts = path.split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    owner = next((tail for tail in tails if tail in weights), None)
    letters = None if owner is None else _letters_kept(owner, weights[owner].shape, leaf.shape)
    if letters is not None:
      return _sharding(mesh, owner, letters, leaf.shape, WEIGHTS)
    if math.prod(leaf.shape) > 1024:
      raise UserError(f"optimizer state {path!r} of shape {leaf.shape} belongs to no weight")
    return NamedSharding(mesh, PartitionSpec())

  return tree.map_with_path(sharding, optimizer)


def _letters_kept(path: str, shape, moment_shape) -> str | None:
  """Letters of a moment that has some dimensions of its weight, in order; None if it has not. Of
  dimensions of one size either may be meant: both shardings are right."""
  letters = letters_of(path, len(shape))
  for dims in itertools.combinations(range(len(shape)), len(moment_shape)):
    if tuple(shape[dim] for dim in dims) == tuple(moment_shape):
      return "".join(letters[dim] for dim in dims)
  return None


def check_layout(mesh: Mesh, model, table: dict):
  """Refuses a mesh axis that shards nothing, and large weights that no axis shards.

  Raises:
    LayoutError: names the axis and its letters, or the array, its letters and its size.
  """
  weights = tree.flatten(model)
  letters = {path: letters_of(path, len(leaf.shape)) for path, leaf in weights.items()}
  axes = {path: {a for l in text for a in axes_of(l, table)} for path, text in letters.items()}
  sizes = {axis: mesh.shape[axis] for axis in ("fsdp", "stage", "tensor") if mesh.shape[axis] > 1}
  if table is REPLICATED:
    sizes.pop("fsdp", None)
  for axis in ("data", "expert", "context"):
    size = mesh.shape[axis]
    if size > 1 and not any(axis in axes_of(letter) for letter in "bt"):
      raise LayoutError(f"mesh axis {axis} {size} shards neither rows (b) nor positions (t)")
  for axis, size in sizes.items():
    if not any(axis in own for own in axes.values()):
      rule = ", ".join(letter for letter in table if axis in axes_of(letter, table)) or "no letter"
      raise LayoutError(f"mesh axis {axis} {size} shards no weight: the rule is {rule} → {axis}")
  within_layer = sizes.keys() - {"stage"}  # what is outside the layers is replicated over stages
  for path, leaf in weights.items():
    size_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    if within_layer and size_bytes > REPLICATED_BYTES and not within_layer & axes[path]:
      raise LayoutError(
        f"{path!r} ({letters[path]}) of {size_bytes / 1e6:.0f} MB would be replicated: no rule "
        f"shards it over {', '.join(sorted(within_layer))}"
      )


def check_divides(mesh: Mesh, name: str, letters: str, shape, table: dict = ACTIVATIONS):
  """Raises a `UserError` naming array, letter, size and axes where the mesh does not divide."""
  for letter, size in zip(letters, shape, strict=True):
    axes = _axes_for(letter, size, table, mesh)
    if size % math.prod(mesh.shape[axis] for axis in axes):
      cut = [axis for axis in axes if mesh.shape[axis] > 1]
      raise UserError(
        f"{name!r} has {size} {LETTERS[letter]} ({letter!r}), which mesh "
        f"{' × '.join(f'{axis} {mesh.shape[axis]}' for axis in cut)} does not divide"
      )
