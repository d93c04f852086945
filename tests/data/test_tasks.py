"""Proves that targets are shifted once and that only predictions within a document count."""

import numpy as np
from numpy.testing import assert_array_equal

from llmjax.data.tasks import language_model, score_only, segment_positions

#              two documents, then padding       one document that fills its row
TOKENS = np.array([[5, 6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def test_next_tokens_are_targets_within_a_document_only():
  batch = language_model(TOKENS, SEGMENTS)
  assert_array_equal(batch.tokens_bt, TOKENS[:, :-1])
  assert_array_equal(batch.targets_bt, [[6, 7, 0, 9, 0, 0], [2, 3, 4, 5, 6, 7]])
  assert_array_equal(batch.loss_mask_bt, [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
  assert_array_equal(batch.segments_bt, SEGMENTS[:, :-1])
  assert_array_equal(batch.positions_bt, [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def test_dtypes_are_those_that_batch_promises():
  batch = language_model(TOKENS.astype(np.int64), SEGMENTS.astype(np.int64))
  kinds = {name: array.dtype for name, array in vars(batch).items()}
  assert kinds.pop("loss_mask_bt") == np.float32
  assert set(kinds.values()) == {np.dtype(np.int32)}


def test_score_only_counts_the_marked_tokens_as_predictions():
  scored = np.zeros(TOKENS.shape, bool)
  scored[0, [2, 3]] = True  # token 3 starts a document: nobody predicts it
  scored[1, 6] = True
  batch = score_only(TOKENS, SEGMENTS, scored)
  assert_array_equal(batch.loss_mask_bt, [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
  assert_array_equal(batch.targets_bt, language_model(TOKENS, SEGMENTS).targets_bt)
  assert batch.loss_mask_bt.dtype == np.float32


def test_positions_count_from_each_segments_start():
  segments = np.array([[1, 1, 2, 2, 2], [3, 1, 1, 3, 3], [0, 0, 0, 0, 0]])
  expected = [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1], [0, 1, 2, 3, 4]]
  assert_array_equal(segment_positions(segments), expected)
