"""Proves that SwiGLU equals its formula, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from llmjax.nn.mlp import SwiGlu
from tests.reference import layers
from tests.reference.gradient import vjp


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_forward_and_gradient_equal_the_reference():
  layer = SwiGlu(jax.random.key(0), {"d": 16, "f": 24}, 1.0)
  x, grad = random(2, 3, 16), random(2, 3, 16, seed=1)
  weights = (layer.gate_df, layer.up_df, layer.down_fd)
  mine, pull_mine = jax.vjp(lambda f, x: f(x), layer, x)
  inputs = [np.asarray(array, np.float64) for array in (x, *weights)]
  # Two nested sums of at most 24 terms of order 1, twice over: some 2^4 roundings of 2^-24.
  tolerance = dict(rtol=5e-6, atol=2e-6)
  assert_allclose(mine, layers.swiglu(*inputs), **tolerance)
  (mine_f, mine_x), (theirs_x, *theirs_w) = pull_mine(grad), vjp(layers.swiglu, inputs, grad)
  assert_allclose(mine_x, theirs_x, **tolerance)
  for one, other in zip((mine_f.gate_df, mine_f.up_df, mine_f.down_fd), theirs_w, strict=True):
    assert_allclose(one, other, **tolerance)
  assert mine.dtype == jnp.float32


def test_bf16_stays_bf16_and_weight_gradients_fp32():
  layer = SwiGlu(jax.random.key(0), {"d": 16, "f": 24}, 1.0)
  x = random(2, 3, 16).astype(jnp.bfloat16)
  out, pull = jax.vjp(lambda f, x: f(x), layer, x)
  grads, grad_x = pull(out)
  assert (out.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
