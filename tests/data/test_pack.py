"""Proves that packed rows equal the naive ones, and that every token is predicted exactly once."""

import collections

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_array_equal

from llmjax.core.errors import UserError
from llmjax.data.pack import PackedRows, window_row, windows
from llmjax.data.prepare import TokenStore
from llmjax.data.tasks import language_model, score_only
from tests.reference.packing import packed_rows


def store_of(lengths):
  """A store in memory in which every token is unlike every other; returns its documents too."""
  documents, first = [], 1
  for length in lengths:
    documents.append(np.arange(first, first + length, dtype="<u4"))
    first += length
  records = [ids.tobytes() for ids in documents]
  return TokenStore("key", np.array(lengths, np.int64), 0, records), documents


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(lengths, st.integers(1, 30), st.integers(0, 5))
def test_packed_rows_equal_the_naive_ones(lengths, row_tokens, seed):
  store, documents = store_of(lengths)
  if sum(lengths) - 1 < row_tokens:
    with pytest.raises(UserError, match=rf"has {sum(lengths)} tokens, .* {row_tokens + 1}"):
      PackedRows(store, row_tokens, seed)
    return
  rows = PackedRows(store, row_tokens, seed)
  naive = [row for epoch in range(2) for row in packed_rows(documents, row_tokens, seed, epoch)]
  assert len(naive) == 2 * rows.rows_per_epoch
  for index, (tokens, segments) in enumerate(naive):
    made_tokens, made_segments = rows[index]
    assert_array_equal(made_tokens, tokens)
    assert_array_equal(made_segments, segments)
    assert (made_tokens.dtype, made_segments.dtype) == (np.int32, np.int32)


@settings(deadline=None, max_examples=150)
@given(lengths, st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_predicts_every_token_once_but_first_ones_and_the_tail(lengths, row_tokens, epoch):
  store, documents = store_of(lengths)
  if sum(lengths) - 1 < row_tokens:
    return
  rows = PackedRows(store, row_tokens, seed=3)
  first = epoch * rows.rows_per_epoch
  made = [rows[index] for index in range(first, first + rows.rows_per_epoch)]
  batch = language_model(*(np.stack(column) for column in zip(*made, strict=True)))
  counted = collections.Counter(batch.targets_bt[batch.loss_mask_bt > 0].tolist())
  assert set(counted.values()) <= {1}

  starts = {int(ids[0]) for ids in documents}
  assert not starts & counted.keys()
  missing = {token for ids in documents for token in ids.tolist()} - starts - counted.keys()
  # What no row reaches is the end of the stream: fewer tokens than a row, the last ones of the
  # documents they belong to.
  tail = (sum(lengths) - 1) % row_tokens
  assert len(missing) <= tail
  for ids in documents:
    lost = [token in missing for token in ids.tolist()]
    assert lost == sorted(lost)
  # The input before each target is the token before it in its document.
  inputs = batch.tokens_bt[batch.loss_mask_bt > 0]
  assert_array_equal(inputs, batch.targets_bt[batch.loss_mask_bt > 0] - 1)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_rows_depend_on_seed_and_index_alone_whatever_the_order_of_asking(data):
  store, _ = store_of([7, 30, 2, 19, 5, 11])
  there = PackedRows(store, 6, seed=1)
  expected = [there[index] for index in range(4 * there.rows_per_epoch)]
  asked = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
  here = PackedRows(store, 6, seed=1)
  for index in asked:
    for mine, theirs in zip(here[index], expected[index], strict=True):
      assert_array_equal(mine, theirs)


def test_seeds_and_epochs_have_orders_of_their_own():
  store, _ = store_of([9] * 20)
  rows, other = PackedRows(store, 6, seed=1), PackedRows(store, 6, seed=2)
  n = rows.rows_per_epoch
  epochs = [np.stack([rows[e * n + i][0] for i in range(n)]) for e in range(2)]
  assert (epochs[0] != epochs[1]).any()
  assert (np.stack([other[i][0] for i in range(n)]) != epochs[0]).any()


@settings(deadline=None, max_examples=200)
@given(lengths, st.integers(1, 25), st.integers(1, 25))
def test_windows_score_each_token_once_after_enough_context(lengths, row_tokens, stride):
  stride = min(stride, row_tokens)
  store, documents = store_of(lengths)
  where = {int(t): (n, i) for n, ids in enumerate(documents) for i, t in enumerate(ids)}
  counted = collections.Counter()
  for window in windows(store.lengths, row_tokens, stride):
    assert window.positions <= row_tokens
    row = max(1, window.positions)  # no wider than what it needs
    tokens, segments, scored = window_row(store[window.document], window, row)
    assert tokens.shape == segments.shape == scored.shape == (row + 1,)
    batch = score_only(tokens[None], segments[None], scored[None])
    for place in np.flatnonzero(batch.loss_mask_bt[0]):
      target = int(batch.targets_bt[0, place])
      counted[target] += 1
      document, index = where[target]
      # All that stands before the target in its row is what stands before it in its document …
      context = documents[document][index - place - 1 : index]
      assert_array_equal(batch.tokens_bt[0, : place + 1], context)
      # … and it is the whole of it or at least row_tokens - stride + 1 tokens.
      assert place + 1 >= min(index, row_tokens - stride + 1)
  every = {int(token) for ids in documents for token in ids[1:]}
  assert counted == collections.Counter(every)
