"""Proves that `dot` equals exact sums, forward and backward, in fp32 and in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core.dot import dot

# Every equation the library uses, with operand shapes.
EQUATIONS = [
  ("btd,df->btf", (2, 3, 16), (16, 24)),
  ("btd,dnh->btnh", (2, 3, 16), (16, 4, 6)),
  ("btnh,nhd->btd", (2, 3, 4, 6), (4, 6, 16)),
  ("btd,vd->btv", (2, 3, 16), (20, 16)),
  ("bkqh,bksh->bkqs", (2, 2, 5, 6), (2, 2, 7, 6)),
  ("bkqs,bksh->bkqh", (2, 2, 5, 7), (2, 2, 7, 6)),
]


def operands(eq, a_shape, b_shape, dtype=np.float32):
  """Random operands and an incoming gradient of the output's shape."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=a_shape), rng.normal(size=b_shape)
  grad = rng.normal(size=np.einsum(eq, a, b).shape)
  return jnp.asarray(a, dtype), jnp.asarray(b, np.float32), jnp.asarray(grad, np.float32)


def exact(eq, *arrays):
  """The contraction in float64."""
  return np.einsum(eq, *(np.asarray(array, np.float64) for array in arrays))


def backward_equations(eq):
  a, rest = eq.split(",")
  b, out = rest.split("->")
  return f"{out},{b}->{a}", f"{out},{a}->{b}"


@pytest.mark.parametrize(("eq", "a_shape", "b_shape"), EQUATIONS)
def test_fp32_forward_and_gradient_equal_the_exact_sums(eq, a_shape, b_shape):
  a, b, grad = operands(eq, a_shape, b_shape)
  out, pull = jax.vjp(lambda a, b: dot(eq, a, b), a, b)
  grad_a, grad_b = pull(grad)
  to_a, to_b = backward_equations(eq)
  # Sums of at most 36 products of unit normals: |sum| of absolute terms < 100, times 2^-24 and
  # a growth of log2(36) roundings, is below 4e-5 / 2.
  for mine, theirs in (
    (out, exact(eq, a, b)),
    (grad_a, exact(to_a, grad, b)),
    (grad_b, exact(to_b, grad, a)),
  ):
    assert mine.dtype == jnp.float32
    assert_allclose(mine, theirs, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(("eq", "a_shape", "b_shape"), EQUATIONS)
def test_bf16_result_is_the_fp32_sum_of_rounded_operands_rounded_once(eq, a_shape, b_shape):
  a, w, _ = operands(eq, a_shape, b_shape, jnp.bfloat16)
  out = dot(eq, a, w)
  assert out.dtype == jnp.bfloat16
  theirs = exact(eq, a, w.astype(jnp.bfloat16))
  # One rounding to 8 significant bits: half a unit in the last place is at most 2^-8 of
  # the value; the absolute part is the fp32 sum itself, as above.
  assert_allclose(np.asarray(out, np.float64), theirs, rtol=2**-8, atol=2e-5)


def test_sums_of_thousands_of_bf16_terms_are_kept_in_fp32():
  # 4096 ones and one 2^-8: a bf16 accumulator stops growing at 256.
  x = jnp.ones((1, 1, 4096), jnp.bfloat16)
  out = dot("btd,df->btf", x, jnp.ones((4096, 1), jnp.float32), jnp.float32)
  assert float(out[0, 0, 0]) == 4096.0


@pytest.mark.parametrize(("eq", "a_shape", "b_shape"), EQUATIONS)
def test_bf16_weight_gradient_comes_back_in_fp32_unrounded(eq, a_shape, b_shape):
  a, w, grad = operands(eq, a_shape, b_shape, jnp.bfloat16)
  grad = grad.astype(jnp.bfloat16)
  _, pull = jax.vjp(lambda a, w: dot(eq, a, w), a, w)
  grad_a, grad_w = pull(grad)
  assert (grad_a.dtype, grad_w.dtype) == (jnp.bfloat16, jnp.float32)
  to_a, to_w = backward_equations(eq)
  # fp32 accumulation of exact bf16 products, as in the fp32 test; rounding to bf16 would be
  # an error of up to 4e-3 of the value.
  assert_allclose(grad_w, exact(to_w, grad, a), rtol=1e-6, atol=2e-5)
  theirs = exact(to_a, grad, w.astype(jnp.bfloat16))
  assert_allclose(np.asarray(grad_a, np.float64), theirs, rtol=2**-8, atol=2e-5)
  rounded = np.asarray(grad_w.astype(jnp.bfloat16).astype(jnp.float32))
  assert np.mean(rounded != np.asarray(grad_w)) > 0.5


def test_out_dtype_keeps_the_fp32_sum():
  a, w, _ = operands("btd,vd->btv", (2, 3, 16), (20, 16), jnp.bfloat16)
  out = dot("btd,vd->btv", a, w, jnp.float32)
  assert out.dtype == jnp.float32
  # As in the fp32 test: 16 products summed in fp32.
  assert_allclose(out, exact("btd,vd->btv", a, w.astype(jnp.bfloat16)), rtol=1e-6, atol=2e-5)


def test_dot_is_the_same_under_jit():
  a, w, _ = operands("btd,df->btf", (2, 3, 16), (16, 24))
  jitted = jax.jit(lambda a, w: dot("btd,df->btf", a, w))(a, w)
  assert_array_equal(jitted, dot("btd,df->btf", a, w))
