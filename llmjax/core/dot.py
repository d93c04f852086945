"""`dot`, the only matrix multiplication by a weight: operands in the compute dtype, sums in fp32,
the backward ones too. The backward pass is written by hand: XLA's CPU backend would otherwise
convert bf16 operands to fp32 before each dot."""

import functools
import re

import jax
import jax.numpy as jnp

from llmjax.core.weight import cast, decode, pull, scale_skips, summands

TENSOR_LETTERS = set("nkfv")  # which mesh axis `tensor` shards, as in parallel/rules.py


def dot(eq: str, a, b, out_dtype=None):
  """Contracts an array with a weight or another array: `dot("btd,df->btf", x_btd, up_df)`.

  Args:
    eq: einsum equation of two operands; every letter stands in at least two of its three terms.
    a: array in the compute dtype.
    b: array of any float dtype, cast to that of `a`; or a weight of any kind.
    out_dtype: dtype of the result; that of `a` by default.
  Returns:
    The contraction, summed in fp32; gradients in the dtypes of `a` and of `b`, not rounded before.
  """
  dtype, terms = jnp.dtype(out_dtype or a.dtype).name, []
  for term in summands(b):
    if not isinstance(term, tuple):
      terms.append(_contract(eq, dtype, a, term))
      continue
    factor, leaves, letters = term
    (first, left), (second, right) = _two_products(eq, leaves, letters)
    terms.append(factor * _contract(second, dtype, _contract(first, a.dtype.name, a, left), right))
  return functools.reduce(jnp.add, terms)


def _two_products(eq: str, leaves: tuple, letters: tuple[str, str]) -> tuple:
  """A product with a b as two: ((equation, leaf), (equation, leaf)), contracted letters first."""
  x, w, out = re.split(",|->", eq)
  contracted = set(w) - set(out)
  first, second = (0, 1) if contracted <= set(letters[0]) else (1, 0)
  between = "".join(letter for letter in x if letter not in contracted) + "a"
  return (
    (f"{x},{letters[first]}->{between}", leaves[first]),
    (f"{between},{letters[second]}->{out}", leaves[second]),
  )


def _einsum(eq, a, b):
  """Multiplies with heads and their channels (`nh`, `kh`) as one dimension, as they lie in memory.
  With two contracted dimensions XLA may choose to transpose the weight, at every call."""
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
  wide = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
  return jnp.einsum(eq, a, b, preferred_element_type=wide).reshape(shape)


def _multiply(eq, a, leaf):
  """The product with what a leaf decodes to; with its codes themselves where the leaf says so."""
  a_letters, b_letters, out = re.split(",|->", eq)
  scales = "".join(letter for letter in b_letters if letter not in scale_skips(b_letters))
  if getattr(leaf, "activations", "") != "int8" or not set(scales) <= set(out):
    return _einsum(eq, a, decode(leaf, a.dtype))
  summed = tuple(i for i, letter in enumerate(a_letters) if letter not in out)
  high = jnp.max(jnp.abs(a), axis=summed, keepdims=True).astype(jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  if "tensor" in mesh.manual_axes and {a_letters[i] for i in summed} & TENSOR_LETTERS:
    high = jax.lax.pmax(high, "tensor")  # one scale for a row, however its channels are sharded
  unit = jnp.maximum(high, 1e-30) / 127
  codes = jnp.round(a.astype(jnp.float32) / unit).astype(jnp.int8)
  y = _einsum(eq, codes, decode(leaf.codes)).astype(jnp.float32)
  kept = "".join(letter for letter in a_letters if letter in out)
  both = jnp.squeeze(unit, summed), decode(leaf.scale, jnp.float32)
  return jnp.einsum(f"{out},{kept},{scales}->{out}", y, *both)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(eq, out_dtype, a, leaf):
  return _contract_forward(eq, out_dtype, a, leaf)[0]


def _contract_forward(eq, out_dtype, a, leaf):
  low = cast(leaf, a.dtype)
  y = _multiply(eq, a, low).astype(out_dtype)
  return y, (a, low, jax.tree.map(lambda array: jnp.zeros((), array.dtype), leaf))


def _contract_backward(eq, out_dtype, residuals, grad):
  a, low, like = residuals
  a_letters, b_letters, out = re.split(",|->", eq)
  grad = grad.astype(a.dtype)
  grad_a = _einsum(f"{out},{b_letters}->{a_letters}", grad, decode(low, a.dtype)).astype(a.dtype)
  grad_b = _einsum(f"{out},{a_letters}->{b_letters}", grad, a)
  return grad_a, pull(low, grad_b, like)


_contract.defvjp(_contract_forward, _contract_backward)
