"""Proves by chi-squared that tokens are drawn from the promised distribution and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from llmjax.core.errors import UserError
from llmjax.serve.sample import RowSampling, Sampling, draw, filter_logits, penalize
from tests.reference.sampling import distribution

pytestmark = pytest.mark.usefixtures("quick_module")

DRAWS = 40_000
LOGITS = np.array([1.2, -0.3, 2.0, 0.1, 1.9, -1.5, 0.6, -2.0, 1.0, 0.0], np.float32)

jit_draw = jax.jit(draw)


def rows_of(count, temperature, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> RowSampling:
  """As many rows of equal sampling and key: they differ by the positions they draw at."""
  one = RowSampling.of([Sampling(temperature, top_k, top_p, seed=seed, min_p=min_p)], [()])
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), one)


def counts_of(seed, temperature, top_k, top_p, min_p=0.0):
  logits = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
  rows = rows_of(DRAWS, temperature, top_k, top_p, min_p, seed)
  drawn = jit_draw(logits, rows, jnp.arange(DRAWS))
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
  counts = counts_of(1, temperature, top_k, top_p)
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
  counts = counts_of(1, temperature, 0, 1.0, min_p)
  kept = expected > 0
  assert counts[~kept].sum() == 0
  assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-4 or kept.sum() == 1


def test_a_penalty_lowers_what_was_seen_whatever_its_sign():
  seen = np.array([[True, True, False, True, False]])
  found = penalize(np.array([[3.0, -3.0, 3.0, 0.0, -3.0]], np.float32), seen, np.array([1.5]))
  assert_array_equal(found, [[2.0, -4.5, 3.0, 0.0, -3.0]])


def test_the_filtered_scores_are_the_distribution():
  for temperature, top_k, top_p in [(0.7, 0, 1.0), (1.3, 4, 0.9), (1.0, 0, 0.3)]:
    filtered = filter_logits(LOGITS[None], rows_of(1, temperature, top_k, top_p))
    found = jax.nn.softmax(filtered)[0]
    expected = distribution(LOGITS.tolist(), temperature, top_k, top_p)
    assert_array_equal(np.asarray(found) == 0, np.array(expected) == 0)
    # Softmax of ten scores in fp32.
    assert_allclose(found, expected, rtol=2e-6)


def test_rows_are_drawn_from_distributions_of_their_own():
  """Each row has its own scores, temperature, top-k, nucleus and min-p, in one batch."""
  cases = [(1.0, 2, 1.0, 0.0), (0.5, 0, 0.8, 0.0), (1.5, 0, 1.0, 0.3), (0.0, 0, 1.0, 0.0)]
  scores = [LOGITS, LOGITS[::-1], LOGITS, LOGITS[::-1]]
  each = 1000
  rows = [rows_of(each, t, k, p, m) for t, k, p, m in cases]
  rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
  logits = np.repeat(np.stack(scores), each, axis=0)
  drawn = np.asarray(jit_draw(logits, rows, jnp.arange(len(logits)))).reshape(4, each)
  for tokens, case, own in zip(drawn[:3], cases[:3], scores[:3], strict=True):
    expected = np.array(distribution(own.tolist(), *case))
    counts = np.bincount(tokens, minlength=len(own))
    kept = expected > 0
    assert counts[~kept].sum() == 0 and (~kept).any()
    assert stats.chisquare(counts[kept], expected[kept] * each).pvalue > 1e-4
  assert set(drawn[3]) == {7}


def test_temperature_zero_takes_the_highest_score_whatever_the_filter():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(100, 30)).astype(np.float32)
  for top_k, top_p in [(0, 1.0), (5, 0.5)]:
    drawn = jit_draw(rows, rows_of(100, 0.0, top_k, top_p), jnp.arange(100))
    assert_array_equal(drawn, rows.argmax(-1))


def test_a_nucleus_however_small_keeps_the_highest_score():
  tiled = np.tile(LOGITS, (1000, 1))
  drawn = jit_draw(tiled, rows_of(1000, 1.0, top_p=1e-6), jnp.arange(1000))
  assert set(np.asarray(drawn)) == {2}


def test_top_one_is_greedy():
  assert counts_of(3, 5.0, 1, 1.0)[2] == DRAWS


def test_the_same_key_draws_the_same_and_another_does_not():
  again = functools.partial(counts_of, temperature=1.0, top_k=0, top_p=1.0)
  assert_array_equal(again(1), again(1))
  assert (again(1) != again(2)).any()


def test_a_nucleus_of_one_keeps_every_token():
  peaked = np.array([[0.0, -18.0, -18.5, -25.0]], np.float32)
  assert np.isfinite(filter_logits(peaked, rows_of(1, 1.0))).all()


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
