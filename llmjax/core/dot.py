"""`dot`: the only matrix multiplication against a weight, and `contract`, its twin for activations.

Operands are in the compute dtype, every sum (forward and both backward ones) is in fp32. Without
the hand-written backward pass XLA's CPU backend converts bf16 operands to fp32 before each dot.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ShardedWeight(NamedTuple):
  """A weight of which every device along a mesh axis holds a part, inside a `shard_map` over it.

  A product gathers it in the compute dtype, in each direction anew, and scatters its gradient.

  Attributes:
    own: the device's part.
    place: where it is cut.
  """

  own: jax.Array
  place: "ShardSpec"


class ShardSpec(NamedTuple):
  """Where a weight is cut.

  Attributes:
    axis: name of the mesh axis.
    dim: dimension.
    sums: dtype in which its gradient is summed over that axis.
  """

  axis: str
  dim: int
  sums: str


def own_and_place(w) -> tuple:
  """Takes a weight or a `ShardedWeight` apart: (array, where it is cut or None)."""
  return w if isinstance(w, ShardedWeight) else (w, None)


def gather(own, place: ShardSpec | None):
  """Makes a device's part whole; a weight that is cut nowhere is so already."""
  return own if place is None else jax.lax.all_gather(own, place.axis, axis=place.dim, tiled=True)


def scatter(grad, place: ShardSpec | None):
  """Sums over devices, of which each keeps its part: what `gather` is back."""
  if place is None:
    return grad
  low = grad.astype(place.sums)
  own = jax.lax.psum_scatter(low, place.axis, scatter_dimension=place.dim, tiled=True)
  return own.astype(grad.dtype)


def dot(eq: str, x, w, out_dtype=None):
  """Contracts an activation with a weight leaf: `dot("btd,df->btf", x_btd, up_df)`.

  Args:
    eq: einsum equation of two operands; every letter stands in at least two of its three terms.
    x: activation, compute dtype.
    w: weight leaf or its `ShardedWeight`, of any float dtype; it is cast to the dtype of `x` and
      its gradient comes back in its own dtype, unrounded.
    out_dtype: dtype of the result; that of `x` by default.
  Returns:
    The contraction, summed in fp32.
  """
  return contract(eq, x, w, out_dtype)


def contract(eq: str, a, b, out_dtype=None):
  """Contracts two arrays in the dtype of the first, summing in fp32 in both directions.

  Args:
    eq: einsum equation of two operands; every letter stands in at least two of its three terms.
    a: array in the compute dtype.
    b: array or `ShardedWeight` of any float dtype, cast to that of `a`.
    out_dtype: dtype of the result; that of `a` by default.
  Returns:
    The contraction, summed in fp32; gradients in the dtypes of `a` and of `b`.
  """
  b, place = own_and_place(b)
  return _contract(eq, jnp.dtype(out_dtype or a.dtype).name, place, a, b)


def _einsum(eq, a, b):
  """Multiplies with heads and their channels (`nh`, `kh`) as one dimension, as they lie in memory.

  With two contracted dimensions XLA may choose to transpose the weight, at every call.
  """
  terms = re.split(",|->", eq)
  sizes = dict(zip(terms[0] + terms[1], a.shape + b.shape, strict=True))
  shape = [sizes[letter] for letter in terms[2]]
  for pair in ("nh", "kh"):
    if pair in eq and all(pair in term or not set(pair) & set(term) for term in terms):
      sizes[pair[0]] *= sizes[pair[1]]
      terms = [term.replace(pair, pair[0]) for term in terms]
  a, b = (
    x.reshape([sizes[letter] for letter in term]) for x, term in zip((a, b), terms, strict=False)
  )
  eq = f"{terms[0]},{terms[1]}->{terms[2]}"
  return jnp.einsum(eq, a, b, preferred_element_type=jnp.float32).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract(eq, out_dtype, place, a, b):
  return _contract_forward(eq, out_dtype, place, a, b)[0]


def _contract_forward(eq, out_dtype, place, a, b):
  low = b.astype(a.dtype)
  made = _einsum(eq, a, gather(low, place)).astype(out_dtype)
  return made, (a, low, jnp.zeros((), b.dtype))


def _contract_backward(eq, out_dtype, place, residuals, grad):
  a, b, like_b = residuals
  a_letters, b_letters, out = re.split(",|->", eq)
  grad = grad.astype(a.dtype)
  grad_a = _einsum(f"{out},{b_letters}->{a_letters}", grad, gather(b, place)).astype(a.dtype)
  grad_b = _einsum(f"{out},{a_letters}->{b_letters}", grad, a).astype(like_b.dtype)
  return grad_a, scatter(grad_b, place)


_contract.defvjp(_contract_forward, _contract_backward)
