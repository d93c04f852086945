"""`param`: the one declaration of a weight, by name, letters, sizes and initializer.

The name carries the letters, the letters the sizes and the sharding; the abstract tree, partition
specs, sharded init and every count derive from it through `jax.eval_shape`.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut at ±2


def normal(std: float):
  """Initializer: normal cut at two standard deviations, rescaled to have `std`."""

  def init(key, shape):
    return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * (std / _TRUNCATED_STD)

  return init


def constant(value: float):
  """Initializer: the same value everywhere."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def fan_in(dims: Mapping[str, int], letters: str, scale: float = 1.0):
  """Initializer: normal with std scale / √(product of the contracted dimensions)."""
  return normal(scale / math.sqrt(math.prod(dims[letter] for letter in letters)))


def param(key, name: str, dims: Mapping[str, int], init):
  """Declares a weight: `self.up_df = param(key, "up_df", dims, fan_in(dims, "d"))`.

  Args:
    key: the module's PRNG key; the weight's own is folded in from its name, so adding a weight
      changes no other.
    name: attribute name; its last part spells the letters.
    dims: size of each letter.
    init: `(key, shape) -> array`.
  Returns:
    An fp32 array, marked as a leaf of its module.
  """
  shape = tuple(dims[letter] for letter in name.rsplit("_", 1)[-1])
  return nnx.data(init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape))
