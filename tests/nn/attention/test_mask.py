"""Proves that every rule lets a query see what it should, in whole and in part, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llmjax.nn.attention.mask import Mask, MaskSpec, cache_mask, cross_mask, self_mask
from tests.reference.masks import keys_of

SPARSE = dict(sparse_block=2, sparse_local=2)
RULES = {
  "causal": dict(causal=True),
  "both ways": dict(causal=False),
  "window": dict(causal=True, window=3),
  "window of one": dict(causal=True, window=1),
  "window both ways": dict(causal=False, window=3),
  "sparse": dict(causal=True, **SPARSE),
  "sparse of own block": dict(causal=False, sparse_block=3, sparse_local=1),
  "sparse global": dict(causal=True, **SPARSE, sparse_global=1),
  "sparse both ways": dict(causal=False, **SPARSE, sparse_global=1),
  "sparse strided": dict(causal=False, sparse_block=2, sparse_local=1, sparse_stride=3),
}
# Documents of 7 and 5 with padding, one of 14, and three.
SEGMENTS = np.array([[1] * 7 + [2] * 5 + [0] * 2, [1] * 14, [1] + [2] * 4 + [3] * 9])
POSITIONS = np.array([[*range(7), *range(5), 0, 1], [*range(14)], [0, *range(4), *range(9)]])
PREFIX = (POSITIONS < 3) & (SEGMENTS > 0)


def table_of(keys, count):
  """The nested list of `keys_of` as a bool array."""
  table = np.zeros((len(keys), len(keys[0]), count), bool)
  for row, queries in enumerate(keys):
    for query, seen in enumerate(queries):
      table[row, query, seen] = True
  return table


def masks_of(rule, segments=True, prefix=False):
  """The library's mask of the rows above, and the reference's table."""
  parts = (SEGMENTS if segments else None, PREFIX if prefix else None)
  arrays = [None if part is None else jnp.asarray(part) for part in parts]
  positions = POSITIONS if segments else np.tile(np.arange(14), (3, 1))
  mask = self_mask(MaskSpec(**rule), arrays[0], jnp.asarray(positions), arrays[1])
  keys = keys_of(positions, positions, rule, parts[0], parts[0], parts[1])
  return mask, table_of(keys, 14)


@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("segments", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_equals_the_reference(rule, segments, prefix):
  mask, expected = masks_of(rule, segments, prefix)
  allowed = np.asarray(mask.allowed())
  assert allowed.dtype == bool and mask.aligned
  assert_array_equal(allowed, expected)
  assert allowed[:, np.arange(14), np.arange(14)].all()  # a query sees itself
  if segments:  # and text never sees padding
    assert not (allowed & (SEGMENTS > 0)[:, :, None] & (SEGMENTS == 0)[:, None]).any()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_tile_is_the_cut_of_the_whole(rule):
  for prefix in (False, True):
    mask, expected = masks_of(rule, prefix=prefix)
    queries, keys = slice(3, 9), slice(0, 11)
    tile = mask.tile(queries, keys)
    assert not tile.aligned
    assert_array_equal(tile.allowed(), expected[:, queries, keys])
    again = tile.tile(slice(1, 3), slice(2, 11))
    assert_array_equal(again.allowed(), expected[:, 4:6, 2:11])


@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("segments", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_range_of_keys_leaves_no_allowed_key_out(rule, segments, prefix):
  mask, expected = masks_of(rule, segments, prefix)
  text = (SEGMENTS > 0) if segments else np.ones((3, 14), bool)
  for start in range(14):
    for stop in range(start + 1, 15):
      first, end = mask.key_range(start, stop, 14)
      assert 0 <= first < end <= 14
      outside = np.ones(14, bool)
      outside[first:end] = False
      assert not (expected & text[:, :, None])[:, start:stop, outside].any()


@pytest.mark.parametrize("rule", ["causal", "window", "window both ways", "window of one"])
def test_the_range_of_keys_is_no_wider_than_it_must_be(rule):
  mask, expected = masks_of(RULES[rule], segments=False)
  for start in range(14):
    for stop in range(start + 1, 15):
      seen = np.flatnonzero(expected[0, start:stop].any(0))
      assert mask.key_range(start, stop, 14) == (seen[0], seen[-1] + 1)


def test_where_places_are_not_positions_every_key_is_in_range():
  positions = jnp.array([[5, 6]])
  assert cache_mask(MaskSpec(window=2), positions, jnp.arange(9)[None]).key_range(0, 1, 9) == (0, 9)
  assert masks_of(RULES["window"])[0].tile(slice(0, 4), slice(0, 14)).key_range(0, 2, 14) == (0, 14)


@pytest.mark.parametrize("rule", ["causal", "window", "sparse global"])
def test_a_cache_is_seen_by_the_rule_up_to_the_querys_own_slot(rule):
  positions = np.array([[0, 1], [3, 4], [7, 8]])
  slots = jnp.tile(jnp.arange(10), (3, 1))
  mask = cache_mask(MaskSpec(**RULES[rule]), jnp.asarray(positions), slots)
  keys = keys_of(positions, np.tile(np.arange(10), (3, 1)), RULES[rule])
  assert_array_equal(mask.allowed(), table_of(keys, 10))


def test_a_cache_in_numbers():
  mask = cache_mask(MaskSpec(), jnp.array([[0, 1], [3, 4]]), jnp.tile(jnp.arange(5), (2, 1)))
  expected = [
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
  ]
  assert_array_equal(mask.allowed(), np.array(expected, bool))


def test_a_prefix_is_seen_by_earlier_queries_too():
  positions = jnp.array([[0, 1, 2, 3], [2, 3, 4, 5]])
  prefix = jnp.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]], bool)
  expected = [
    [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]],
    [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
  ]
  mask = cache_mask(MaskSpec(), positions, jnp.tile(jnp.arange(6), (2, 1)), prefix)
  assert_array_equal(mask.allowed(), np.array(expected, bool))


def test_a_source_is_seen_by_the_queries_of_its_own_number_at_any_distance():
  mask = cross_mask(
    jnp.array([[1, 1, 2, 0]]), jnp.array([[0, 1, 0, 0]]), jnp.array([[1, 2, 2, 1, 0]])
  )
  one, two, none = [1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]
  assert_array_equal(mask.allowed(), np.array([[one, one, two, none]], bool))
  assert mask.key_range(0, 1, 5) == (0, 5)


def test_the_rule_is_static_and_the_arrays_are_leaves():
  leaves, tree = jax.tree.flatten(masks_of(RULES["window"], prefix=True)[0])
  assert len(leaves) == 5
  again = jax.tree.unflatten(tree, leaves)
  assert isinstance(again, Mask) and again.rule == MaskSpec(**RULES["window"]) and again.aligned
