"""Proves that every feed-forward layer equals its formula, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.nn.mlp import ACTIVATIONS, GATED, PLAIN, Mlp
from tests.reference import layers
from tests.reference.gradient import vjp

DIMS = {"d": 6, "f": 8}
# Two nested sums of at most 8 terms of magnitude up to 2^3, and activations that XLA computes to
# some units of fp32: 2^3 roundings of 2^3 · 2^-24, rarely all one way.
FP32 = dict(rtol=5e-6, atol=5e-6)


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer_of(activation, bias):
  """A layer whose weights are all of order one, biases as well."""
  made = jax.eval_shape(lambda: Mlp(jax.random.key(0), DIMS, activation, bias, 1.0))
  leaves, tree = jax.tree.flatten(made)
  weights = [random(*x.shape, seed=10 + i) / (2 if x.ndim > 1 else 1) for i, x in enumerate(leaves)]
  names = ["gate_df", "up_df", "down_fd"][0 if activation in GATED else 1 :]
  if bias:
    names += ["gate_bias_f", "up_bias_f", "down_bias_d"][0 if activation in GATED else 1 :]
  assert len(leaves) == len(names)
  return jax.tree.unflatten(tree, weights), names


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradient_equal_the_reference(activation, bias):
  layer, names = layer_of(activation, bias)
  x, grad = 2 * random(2, 3, 6), random(2, 3, 6, seed=1)

  # It is the library that is tested, not XLA's optimizer, which takes as long again.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def run(layer, x, grad):
    out, pull = jax.vjp(lambda f, x: f(x), layer, x)
    return out, *pull(grad)

  mine, grads, grad_x = run(layer, x, grad)
  inputs = [np.asarray(array, np.float64) for array in (x, *(getattr(layer, n) for n in names))]

  def slow(x, *weights):
    return layers.mlp(x, dict(zip(names, weights, strict=True)), activation)

  assert mine.dtype == jnp.float32
  assert_allclose(mine, slow(*inputs), **FP32)
  found = (grad_x, *(getattr(grads, name) for name in names))
  for one, other, name in zip(found, vjp(slow, inputs, grad), ("x", *names), strict=True):
    assert_allclose(one, other, err_msg=name, **FP32)


def test_every_activation_has_a_reference():
  assert set(PLAIN) == set(layers.ACTIVATIONS) and set(GATED) == set(layers.GATES)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_bf16_stays_bf16_and_weight_gradients_fp32(activation):
  layer, _ = layer_of(activation, bias=True)
  x = random(2, 3, 6).astype(jnp.bfloat16)
  out, pull = jax.vjp(lambda f, x: f(x), layer, x)
  grads, grad_x = pull(out)
  assert (out.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_the_layer_starts_with_the_promised_spread():
  dims = {"d": 64, "f": 256}
  layer = Mlp(jax.random.key(0), dims, "swiglu", True, 0.25)
  # The sample deviation of N values has itself a relative deviation below 1/√(2N); five of them.
  bound = 5 / np.sqrt(2 * 64 * 256)
  expected = {"gate_df": 64**-0.5, "up_df": 64**-0.5, "down_fd": 0.25 * 256**-0.5}
  for name, std in expected.items():
    assert abs(np.std(getattr(layer, name)) / std - 1) < bound
  for name in ("gate_bias_f", "up_bias_f", "down_bias_d"):
    assert not getattr(layer, name).any()
