"""Proves that RMSNorm and LayerNorm equal their formulas, forward and gradient, in fp32 inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.nn.norm import Norm, NormConfig, layer_norm, rms_norm
from tests.reference import layers
from tests.reference.gradient import vjp

RNG = np.random.default_rng(0)
# A mean of 2 beside a deviation of 3, so that subtracting it shows.
X = jnp.asarray(RNG.normal(size=(2, 3, 4, 4)) * 3 + 2, jnp.float32)
GRAD = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
SCALE, BIAS = (jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32) for _ in range(2))
# Sums of 16 terms of order 1 in another order: a few roundings of 2^-24, with room of 2^3.
FP32 = dict(rtol=2e-6, atol=2e-6)
MINE = {"rms": rms_norm, "layer": layer_norm}
THEIRS = {"rms": layers.rms_norm, "layer": layers.layer_norm}


def wide(*arrays):
  return [np.asarray(array, np.float64) for array in arrays]


def case(kind, dimensions, bias):
  """x whose last `dimensions` are normed as one, their scale and, for a LayerNorm, their bias."""
  x = X if dimensions == 2 else X.reshape(2, 3, 16)
  weights = [w if dimensions == 2 else w.ravel() for w in (SCALE, BIAS)]
  return (x, *weights) if bias else (x, weights[0])


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize(("kind", "bias"), [("rms", False), ("layer", False), ("layer", True)])
def test_forward_and_gradient_equal_the_reference(kind, bias, dimensions):
  none = (None,) if kind == "layer" and not bias else ()
  zero = (0.0,) if none else ()
  inputs = case(kind, dimensions, bias)
  grad = GRAD.reshape(inputs[0].shape)
  # An eps of 1 is large enough beside a mean square of 13 to tell where it stands.

  @jax.jit
  def run(grad, *inputs):
    out, pull = jax.vjp(lambda *x: MINE[kind](*x, *none, 1.0), *inputs)
    return out, pull(grad)

  mine, grads = run(grad, *inputs)
  assert_allclose(mine, THEIRS[kind](*wide(*inputs), *zero, 1.0), **FP32)
  theirs = vjp(lambda *x: THEIRS[kind](*x, *zero, 1.0), inputs, grad)
  for found, expected in zip(grads, theirs, strict=True):
    assert found.dtype == jnp.float32
    assert_allclose(found, expected, **FP32)


def test_eps_stands_under_the_root():
  tiny = jnp.full((1, 1, 4), 1e-3, jnp.float32)
  # √(1e-6 + 3e-6) = 2e-3, so every channel becomes one half.
  assert_allclose(rms_norm(tiny, jnp.ones(4), 3e-6), np.full((1, 1, 4), 0.5), rtol=1e-6)
  swing = tiny * jnp.array([1, -1, 1, -1])
  expected = np.array([[[0.5, -0.5, 0.5, -0.5]]])
  assert_allclose(layer_norm(swing, jnp.ones(4), None, 3e-6), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bf16_input_is_normed_in_fp32_and_rounded_once(kind):
  x = X.reshape(2, 3, 16).astype(jnp.bfloat16)
  weights = (SCALE.ravel(), BIAS.ravel()) if kind == "layer" else (SCALE.ravel(),)
  y = MINE[kind](x, *weights, 1e-5)
  assert y.dtype == jnp.bfloat16
  exact = THEIRS[kind](*wide(x, *weights), 1e-5)
  # One rounding to bf16: at most half a unit of the last of 8 bits, 2^-8 of the value; and fp32's
  # own where scaled value and bias cancel.
  assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=2e-6)


def test_large_bf16_values_do_not_overflow():
  y = rms_norm(jnp.full((1, 1, 8), 1e18, jnp.bfloat16), jnp.ones(8), 1e-5)
  assert_allclose(np.asarray(y, np.float32), np.ones((1, 1, 8)), rtol=2**-8)


def test_a_large_mean_does_not_drown_the_deviations():
  x = jnp.asarray(4096 + np.arange(16)[None, None], jnp.float32)  # exact, its mean square is not
  exact = layers.layer_norm(np.asarray(x, np.float64), np.ones(16), 0.0, 1e-5)
  assert_allclose(layer_norm(x, jnp.ones(16), None, 1e-5), exact, **FP32)


@pytest.mark.parametrize("letters", ["d", "nh"])
@pytest.mark.parametrize(
  "config",
  [NormConfig(eps=0.5), NormConfig("layer", eps=0.5), NormConfig("layer", eps=0.5, bias=True)],
  ids=["rms", "layer", "layer with bias"],
)
def test_the_layer_starts_as_the_bare_norm_and_has_the_weights_of_its_kind(config, letters):
  dims = {"d": 16, "n": 4, "h": 4}
  layer = Norm(jax.random.key(0), dims, config, letters)
  x = X if letters == "nh" else X.reshape(2, 3, 16)
  shape = x.shape[-len(letters) :]
  assert getattr(layer, f"scale_{letters}").shape == shape
  assert hasattr(layer, f"bias_{letters}") == config.bias
  zero = (0.0,) if config.kind == "layer" else ()
  expected = THEIRS[config.kind](np.asarray(x, np.float64), np.ones(shape), *zero, 0.5)
  assert_allclose(layer(x), expected, **FP32)
  setattr(layer, f"scale_{letters}", jnp.full(shape, 3.0))
  if config.bias:
    setattr(layer, f"bias_{letters}", jnp.full(shape, 2.0))
  moved = 3 * expected + (2 if config.bias else 0)
  assert_allclose(layer(x), moved, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(kind="rsm"), r"model\.norm\.kind 'rsm' is unknown; did you mean 'rms'\?"),
    (dict(place="before"), r"model\.norm\.place 'before' is unknown; known: .*pre"),
    (dict(eps=0.0), r"model\.norm\.eps 0\.0 is not positive"),
    (dict(bias=True), r"model\.norm\.bias needs model\.norm\.kind=layer"),
  ],
)
def test_a_wrong_config_is_one_sentence(wrong, message):
  with pytest.raises(UserError, match=f"^{message}") as caught:
    NormConfig(**wrong)
  assert "\n" not in str(caught.value)
