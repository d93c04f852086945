"""Proves that rotary positions turn complex numbers, and that scores depend on distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.nn.position import rope_angles, rotate
from tests.reference import layers
from tests.reference.gradient import vjp

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
GRAD = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 7, 30]])


def turn(x, positions, theta):
  return rotate(x, *rope_angles(positions, x.shape[-1], theta))


@pytest.mark.parametrize("theta", [10_000.0, 50.0])
def test_forward_and_gradient_equal_the_reference(theta):
  mine, pull_mine = jax.vjp(lambda x: turn(x, POSITIONS, theta), X)
  theirs = layers.rotary(np.asarray(X, np.float64), POSITIONS, theta)
  (theirs_grad,) = vjp(lambda x: layers.rotary(x, POSITIONS, theta), [X], GRAD)
  # An angle of at most 30 rad is off by 30 · 2^-23 (theta's power and the product are each
  # rounded), and |x| < 4.
  tolerance = dict(rtol=0, atol=4 * 30 * 2**-23)
  assert_allclose(mine, theirs, **tolerance)
  assert_allclose(pull_mine(GRAD)[0], theirs_grad, **tolerance)


def test_angles_far_out_are_those_of_float64_to_fp32_rounding_of_the_angle():
  cos, sin = rope_angles(jnp.array([[100_000]]), 8, 10_000.0)
  angles = 100_000 * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
  # theta^-x and the product each round by 2^-24 of the angle, the exponent by 2^-24 · ln(theta).
  for mine, theirs in ((cos, np.cos(angles)), (sin, np.sin(angles))):
    error = np.abs(np.asarray(mine[0, 0], np.float64) - theirs)
    assert (error <= angles * 2**-24 * (2 + np.log(10_000)) + 2**-22).all()


def test_position_zero_turns_nothing():
  assert_allclose(turn(X, jnp.zeros((2, 5), jnp.int32), 10_000.0), X, rtol=0, atol=0)


def test_scores_depend_on_distance_alone():
  def score(shift):
    q = turn(X[:, :1], jnp.full((2, 1), 9 + shift), 100.0)
    k = turn(X[:, 1:2], jnp.full((2, 1), 4 + shift), 100.0)
    return jnp.sum(q * k, axis=-1)

  # Angles of at most 40 rad, off by 40 · 2^-23 each; 8 products of magnitude below 8.
  assert_allclose(score(31), score(0), rtol=0, atol=8 * 8 * 40 * 2**-23)
  assert np.abs(score(0) - jnp.sum(X[:, :1] * X[:, 1:2], axis=-1)).max() > 0.1


def test_turning_keeps_the_norm_and_the_dtype():
  turned = turn(X, POSITIONS, 10_000.0)
  # cos² + sin² is 1 to fp32 rounding; sums of 8 squares.
  assert_allclose(jnp.sum(turned**2, -1), jnp.sum(X**2, -1), rtol=1e-6)
  assert turn(X.astype(jnp.bfloat16), POSITIONS, 10_000.0).dtype == jnp.bfloat16
