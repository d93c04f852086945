"""Proves that a query sees its own document up to itself, and a cache up to its own slot."""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from llmjax.nn.mask import cache_mask, causal_mask
from tests.reference import layers

SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 2, 2, 3, 0, 0]])
POSITIONS = np.array([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 0, 1]])


def test_the_causal_mask_equals_the_reference():
  mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)))
  table = layers.may_look(SEGMENTS, POSITIONS)
  assert mask.dtype == bool
  for row, queries in enumerate(table):
    for query, keys in enumerate(queries):
      assert np.flatnonzero(mask[row, query]).tolist() == keys


def test_every_query_sees_itself_and_padding_is_never_seen_by_text():
  mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)))
  assert mask[:, np.arange(6), np.arange(6)].all()
  text, padding = SEGMENTS > 0, SEGMENTS == 0
  assert not (mask & text[:, :, None] & padding[:, None, :]).any()


def test_a_cache_is_seen_up_to_the_querys_own_slot():
  mask = cache_mask(jnp.array([[0, 1], [3, 4]]), 5)
  expected = [
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
  ]
  assert_array_equal(mask, np.array(expected, bool))
