"""Proves by chi-squared that tokens are drawn from the promised distribution and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from llmjax.core.errors import UserError
from llmjax.serve.sample import Sampling, draw, filter_logits, penalize
from tests.reference.sampling import distribution

pytestmark = pytest.mark.usefixtures("quick_module")

DRAWS = 40_000
LOGITS = np.array([1.2, -0.3, 2.0, 0.1, 1.9, -1.5, 0.6, -2.0, 1.0, 0.0], np.float32)

jit_draw = jax.jit(draw, static_argnames="top_k")


def counts_of(key, temperature, top_k, top_p, min_p=0.0):
  rows = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
  drawn = jit_draw(key, rows, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  assert drawn.dtype == jnp.int32
  return np.bincount(drawn, minlength=len(LOGITS))


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (2.0, 0, 1.0),
    (1.0, 3, 1.0),
    (1.0, 0, 0.8),
    (0.7, 0, 0.5),
    (1.5, 6, 0.75),  # the nucleus is of what top-k left
    (1.0, 99, 1.0),  # more than there are: all
  ],
)
def test_tokens_are_drawn_from_the_promised_distribution(temperature, top_k, top_p):
  expected = np.array(distribution(LOGITS.tolist(), temperature, top_k, top_p))
  counts = counts_of(jax.random.key(1), temperature, top_k, top_p)
  assert counts[expected == 0].sum() == 0
  kept = expected > 0
  assert expected[kept].min() * DRAWS > 5  # what chi-squared asks for
  assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-4
  # The threshold has power: a temperature 15 % off would not pass.
  if kept.sum() > 2:
    wrong = np.array(distribution(LOGITS.tolist(), temperature * 1.15, top_k, 1.0)) * kept
    wrong /= wrong.sum()
    assert stats.chisquare(counts[kept], wrong[kept] * DRAWS).pvalue < 1e-4


@pytest.mark.parametrize(("temperature", "min_p"), [(1.0, 0.2), (0.5, 0.4), (1.0, 1.0)])
def test_min_p_keeps_a_share_of_the_likeliest(temperature, min_p):
  expected = np.array(distribution(LOGITS.tolist(), temperature, 0, 1.0, min_p))
  assert (expected == 0).any()
  counts = counts_of(jax.random.key(1), temperature, 0, 1.0, min_p)
  kept = expected > 0
  assert counts[~kept].sum() == 0
  assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-4 or kept.sum() == 1


def test_a_penalty_lowers_what_was_seen_whatever_its_sign():
  seen = np.array([[True, True, False, True, False]])
  found = penalize(np.array([[3.0, -3.0, 3.0, 0.0, -3.0]], np.float32), seen, 1.5)
  assert_array_equal(found, [[2.0, -4.5, 3.0, 0.0, -3.0]])


def test_the_filtered_scores_are_the_distribution():
  for temperature, top_k, top_p in [(0.7, 0, 1.0), (1.3, 4, 0.9), (1.0, 0, 0.3)]:
    filtered = filter_logits(LOGITS[None], temperature, top_k, top_p)
    found = jax.nn.softmax(filtered)[0]
    expected = distribution(LOGITS.tolist(), temperature, top_k, top_p)
    assert_array_equal(np.asarray(found) == 0, np.array(expected) == 0)
    # Softmax of ten scores in fp32.
    assert_allclose(found, expected, rtol=2e-6)


def test_rows_are_drawn_from_distributions_of_their_own():
  rows = np.repeat(np.stack([LOGITS, LOGITS[::-1]]), DRAWS // 2, axis=0)
  drawn = np.asarray(jit_draw(jax.random.key(2), rows, 1.0, top_k=2, top_p=1.0))
  assert set(drawn[: DRAWS // 2]) == {2, 4}
  assert set(drawn[DRAWS // 2 :]) == {7, 5}


def test_temperature_zero_takes_the_highest_score_whatever_the_filter():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(100, 30)).astype(np.float32)
  for top_k, top_p in [(0, 1.0), (5, 0.5)]:
    drawn = jit_draw(jax.random.key(0), rows, 0.0, top_k=top_k, top_p=top_p)
    assert_array_equal(drawn, rows.argmax(-1))


def test_a_nucleus_however_small_keeps_the_highest_score():
  drawn = jit_draw(jax.random.key(0), np.tile(LOGITS, (1000, 1)), 1.0, top_k=0, top_p=1e-6)
  assert set(np.asarray(drawn)) == {2}


def test_top_one_is_greedy():
  assert counts_of(jax.random.key(3), 5.0, 1, 1.0)[2] == DRAWS


def test_the_same_key_draws_the_same_and_another_does_not():
  again = functools.partial(counts_of, temperature=1.0, top_k=0, top_p=1.0)
  assert_array_equal(again(jax.random.key(1)), again(jax.random.key(1)))
  assert (again(jax.random.key(1)) != again(jax.random.key(2))).any()


def test_a_nucleus_of_one_keeps_every_token():
  peaked = np.array([[0.0, -18.0, -18.5, -25.0]], np.float32)
  assert np.isfinite(filter_logits(peaked, 1.0, 0, 1.0)).all()


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"temperature": -0.1}, "temperature -0.1"),
    ({"top_k": -1}, "top_k -1"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"top_p": 1.1}, "top_p 1.1"),
    ({"max_tokens": 0}, "max_tokens 0"),
    ({"min_p": 1.5}, "min_p 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    ({"stop": "ab"}, "stop 'ab'"),
    ({"stop": ["a", ""]}, "none of them empty"),
  ],
)
def test_values_that_mean_nothing_are_user_errors(values, words):
  with pytest.raises(UserError, match=words):
    Sampling(**values)
