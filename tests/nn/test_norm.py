"""Proves that RMSNorm equals its formula, forward and gradient, and works in fp32 inside."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from llmjax.nn.norm import RmsNorm, rms_norm
from tests.reference import layers
from tests.reference.gradient import vjp

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 3, 16)) * 3, jnp.float32)
SCALE = jnp.asarray(RNG.normal(size=16), jnp.float32)
GRAD = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)
# Sums of 16 terms of order 1 in another order: a few roundings of 2^-24, with room of 2^3.
FP32 = dict(rtol=2e-6, atol=2e-6)


def reference(x, scale, eps):
  return layers.rms_norm(np.asarray(x, np.float64), np.asarray(scale, np.float64), eps)


def test_forward_and_gradient_equal_the_reference():
  mine, pull_mine = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-2), X, SCALE)
  assert_allclose(mine, reference(X, SCALE, 1e-2), **FP32)
  theirs = vjp(lambda x, scale: layers.rms_norm(x, scale, 1e-2), (X, SCALE), GRAD)
  for grad, expected in zip(pull_mine(GRAD), theirs, strict=True):
    assert_allclose(grad, expected, **FP32)


def test_eps_stands_under_the_root():
  tiny = jnp.full((1, 1, 4), 1e-3, jnp.float32)
  # √(1e-6 + 3e-6) = 2e-3, so every channel becomes one half.
  assert_allclose(rms_norm(tiny, jnp.ones(4), 3e-6), np.full((1, 1, 4), 0.5), rtol=1e-6)


def test_bf16_input_is_normed_in_fp32_and_rounded_once():
  x = X.astype(jnp.bfloat16)
  y = rms_norm(x, SCALE, 1e-5)
  assert y.dtype == jnp.bfloat16
  exact = reference(x, SCALE, 1e-5)
  # One rounding to bf16: at most half a unit of the last of 8 bits, 2^-8 of the value.
  assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=0)


def test_large_bf16_values_do_not_overflow():
  y = rms_norm(jnp.full((1, 1, 8), 1e18, jnp.bfloat16), jnp.ones(8), 1e-5)
  assert_allclose(np.asarray(y, np.float32), np.ones((1, 1, 8)), rtol=2**-8)


def test_the_layer_starts_with_a_scale_of_one():
  layer = RmsNorm(jax.random.key(0), {"d": 16}, 1e-5)
  assert_allclose(layer(X), reference(X, np.ones(16), 1e-5), **FP32)
