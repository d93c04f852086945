"""Proves that cross entropy and its gradient equal a loop over positions, and that masks count."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.training.losses import LossConfig, logits_loss, token_nll
from tests.reference.gradient import vjp
from tests.reference.losses import cross_entropy as slow

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(2, 4, 11)) * 3, jnp.float32)
TARGETS = RNG.integers(0, 11, (2, 4)).astype(np.int32)
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0.5]], np.float32)
# Logs and sums of 11 exponentials, 8 positions of size 10: a few roundings of 2^-24.
FP32 = dict(rtol=2e-6, atol=1e-6)


def test_the_sum_and_its_gradient_equal_the_reference():
  cross_entropy = lambda logits: logits_loss(logits, TARGETS, MASK, LossConfig())  # noqa: E731
  (total, nll), pull = jax.vjp(cross_entropy, LOGITS)
  theirs, number = slow(np.asarray(LOGITS, np.float64), TARGETS, MASK)
  assert_allclose(total, theirs, **FP32)
  assert_allclose(nll, theirs, **FP32)
  assert number == 4.5
  (expected,) = vjp(lambda logits: slow(logits, TARGETS, MASK)[0], [LOGITS], 1.0)
  (grad,) = pull((jnp.float32(1), jnp.float32(0)))
  assert_allclose(grad, expected, **FP32)
  assert_array_equal(np.asarray(grad)[MASK == 0], 0)


def test_uniform_scores_cost_the_logarithm_of_the_vocabulary():
  nll = token_nll(jnp.zeros((2, 4, 11)), TARGETS)
  assert_allclose(nll, np.full((2, 4), np.log(11)), rtol=1e-6)


def test_huge_scores_neither_overflow_nor_lose_the_loss():
  logits = jnp.zeros((1, 1, 3)).at[0, 0, 0].set(1e4)
  assert_allclose(token_nll(logits, np.array([[1]])), [[1e4]], rtol=1e-6)
  assert_allclose(token_nll(logits, np.array([[0]])), [[0]], atol=1e-6)
