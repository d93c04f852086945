"""Proves that dropout zeroes the promised share, keeps the mean, and does nothing without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_array_equal

from llmjax.nn.dropout import NAMES, dropout

COUNT = 20_000
ONES = jnp.ones((100, 200))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_of_zeroes_is_binomial_and_the_rest_is_scaled(rate):
  y = np.asarray(dropout(ONES, rate, jax.random.key(0)))
  kept = y != 0
  # N draws of probability p deviate from pN by √(N p (1 - p)); five of them.
  assert abs(kept.sum() - COUNT * (1 - rate)) < 5 * np.sqrt(COUNT * rate * (1 - rate))
  np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
  # So the mean deviates from 1 by √(rate / ((1 - rate) N)).
  assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / COUNT)
  # No row and no column is dropped as a whole.
  assert kept.any(0).all() and kept.any(1).all()


def test_the_key_alone_decides():
  one, same, other = (dropout(ONES, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
  assert_array_equal(one, same)
  # Two independent draws agree in half of the places.
  assert abs(np.sum(one == other) - COUNT / 2) < 5 * np.sqrt(COUNT / 4)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (0.0, jax.random.key(0))])
def test_without_a_key_or_a_rate_nothing_changes(rate, key):
  x = jax.random.normal(jax.random.key(1), (3, 4))
  assert dropout(x, rate, key) is x


def test_the_gradient_passes_where_the_number_did():
  x = jax.random.normal(jax.random.key(1), (8, 8))
  y, pull = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(0)), x)
  np.testing.assert_allclose(pull(jnp.ones_like(x))[0], np.where(y != 0, 4 / 3, 0), rtol=1e-6)


def test_the_dtype_stays():
  y = dropout(ONES.astype(jnp.bfloat16), 0.1, jax.random.key(0))
  assert y.dtype == jnp.bfloat16 and y.max() == jnp.bfloat16(1 / 0.9)


def test_a_remat_policy_finds_the_names():
  def f(x):
    return jnp.sin(checkpoint_name(jnp.sin(x), NAMES[0]))

  def saved(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    _, pull = jax.vjp(jax.checkpoint(f, policy=policy), jnp.float32(0.5))
    return len([leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")])

  assert f(jnp.float32(0.5)) == jnp.sin(jnp.sin(jnp.float32(0.5)))
  assert saved(NAMES[0]) == saved(NAMES[1]) + 1
