"""Tasks: the one place that shifts targets and decides which predictions count."""

import dataclasses

import numpy as np

from llmjax.data.batch import Batch


def language_model(tokens_bu: np.ndarray, segments_bu: np.ndarray) -> Batch:
  """Makes next-token prediction out of rows one token longer than the batch.

  Args:
    tokens_bu: int32 [b, t + 1] ids.
    segments_bu: int32 [b, t + 1] document numbers, 0 for padding.
  Returns:
    A numpy `Batch` of [b, t]; a prediction counts where the next token is of the same document.
  """
  inputs = segments_bu[:, :-1]
  same = (inputs == segments_bu[:, 1:]) & (inputs > 0)
  return Batch(
    tokens_bt=tokens_bu[:, :-1].astype(np.int32),
    targets_bt=np.where(same, tokens_bu[:, 1:], 0).astype(np.int32),
    loss_mask_bt=same.astype(np.float32),
    segments_bt=inputs.astype(np.int32),
    positions_bt=segment_positions(inputs),
  )


def score_only(tokens_bu: np.ndarray, segments_bu: np.ndarray, scored_bu: np.ndarray) -> Batch:
  """Makes next-token prediction in which only the marked tokens count.

  Args:
    tokens_bu: int32 [b, t + 1] ids.
    segments_bu: int32 [b, t + 1] document numbers, 0 for padding.
    scored_bu: bool [b, t + 1], true for tokens whose prediction counts.
  """
  batch = language_model(tokens_bu, segments_bu)
  return dataclasses.replace(batch, loss_mask_bt=batch.loss_mask_bt * scored_bu[:, 1:])


def segment_positions(segments_bt: np.ndarray) -> np.ndarray:
  """Counts each position from the start of its segment: [1, 1, 2, 2, 2] → [0, 1, 0, 1, 2]."""
  places = np.arange(segments_bt.shape[1], dtype=np.int32)
  starts = np.ones(segments_bt.shape, bool)
  starts[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
  return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1).astype(np.int32)
