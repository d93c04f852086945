"""`param`: the one declaration of a weight, by name, letters, sizes, initializer and role. The
abstract tree, partition specs, sharded initialization and all counts derive from it."""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

# What a weight is for; optimizers, formats and surgery select by it.
#   matrix: maps one space of the network to another.
#   table: embeddings, and what maps into or out of the network: head, patches.
#   scale, bias: not decayed.
#   router_bias: added where experts are chosen, and moved towards even load, not by a gradient.
ROLES = ("matrix", "table", "scale", "bias", "router_bias")
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut at ±2


def normal(std: float):
  """Initializer: normal truncated at two standard deviations, rescaled to have `std`."""

  def init(key, shape):
    return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * (std / _TRUNCATED_STD)

  return init


def constant(value: float):
  """Initializer: the same value everywhere."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def fan_in(dims: Mapping[str, int], letters: str, scale: float = 1.0):
  """Initializer: normal with std scale / √(product of the contracted dimensions)."""
  return normal(scale / math.sqrt(math.prod(dims[letter] for letter in letters)))


def param(
  module: nnx.Module, key, name: str, dims: Mapping[str, int], init, role: str = "matrix"
):
  """Declares a weight of a module: `param(self, key, "up_df", dims, fan_in(dims, "d"))`.

  Args:
    module: gets the weight as attribute `name`, a leaf of its tree, in fp32.
    key: the module's PRNG key; the weight's own is folded in from its name, so adding a weight
      changes no other.
    name: ends in the letters.
    dims: size of each letter.
    init: `(key, shape) -> array`.
    role: one of `ROLES`.
  Raises:
    ValueError: an unknown role.
  """
  if role not in ROLES:
    raise ValueError(f"role {role!r} of {name!r} is not one of {ROLES}")
  shape = tuple(dims[letter] for letter in name.rsplit("_", 1)[-1])
  weight = init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)
  setattr(module, name, nnx.data(weight))
  module.roles = (*getattr(module, "roles", ()), (name, role))


def roles(model) -> dict[str, str]:
  """Maps the path of every declared weight to one of `ROLES`.

  Args:
    model: a module, abstract or not, or a tuple of modules.
  Returns:
    Path → role. The leaves of a weight that is not an array (`core/weight.py`) are below its path.
  """
  return {
    prefix + name: role for prefix, module in _modules(model)
    for name, role in getattr(module, "roles", ())
  }


def fp32_weights(model) -> set[str]:
  """Paths of the matrices and tables that their module reads in fp32, as its `fp32` names them."""
  return {
    prefix + name for prefix, module in _modules(model) for name in getattr(module, "fp32", ())
  }


def _modules(model, prefix: str = ""):
  """Yields (path up to a weight's name, module) of a model and of every module in it."""
  children = enumerate(model) if isinstance(model, tuple) else vars(model).items()
  if not isinstance(model, tuple):
    yield prefix, model
  for name, child in children:
    if isinstance(child, (nnx.Module, tuple)):
      yield from _modules(child, f"{prefix}{name}/")
