"""Packing: documents end to end in a shuffled order, cut into rows of equal length.

Any row is computed by itself from (seed, epoch, row number), on any host, and resuming needs only
the step number."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.core.errors import UserError
from llmjax.data.prepare import TokenStore


class PackedRows:
  """Rows of `row_tokens + 1` tokens; rows that follow each other in the text share one token.

  Args:
    row_tokens: positions a row predicts.
    seed: decides the order of documents and of rows, anew each epoch.
  Raises:
    UserError: all documents together are shorter than one row.
  """

  def __init__(self, store: TokenStore, row_tokens: int, seed: int):
    self._store = store
    self._row_tokens = row_tokens
    self._seed = seed
    total = int(store.lengths.sum())
    self.rows_per_epoch = (total - 1) // row_tokens
    if self.rows_per_epoch < 1:
      raise UserError(
        f"the training text has {total} tokens, fewer than one row of {row_tokens + 1}; "
        "use more text or a smaller model.max_seq_len"
      )
    self._order = functools.lru_cache(maxsize=2)(self._make_order)
    self._document = functools.lru_cache(maxsize=512)(store.__getitem__)

  def _make_order(self, epoch: int):
    rng = np.random.default_rng([self._seed, epoch])
    documents = rng.permutation(len(self._store))
    ends = np.cumsum(self._store.lengths[documents])
    return documents, ends, rng.permutation(self.rows_per_epoch)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes row `index`, counted on through the epochs.

    Returns:
      (tokens, segments), int32 [row_tokens + 1]; segments number the row's documents from 1.
    """
    pieces = [self._document(number)[start:stop] for number, start, stop in self.pieces(index)]
    segments = np.arange(1, len(pieces) + 1, dtype=np.int32)
    return np.concatenate(pieces), np.repeat(segments, list(map(len, pieces)))

  def pieces(self, index: int) -> list[tuple[int, int, int]]:
    """Lists what row `index` is made of, in order.

    Returns:
      (a document's number, its first token in the row, the token after its last) of each segment.
    """
    epoch, index = divmod(int(index), self.rows_per_epoch)
    documents, ends, rows = self._order(epoch)
    start = int(rows[index]) * self._row_tokens
    first, last = np.searchsorted(ends, (start, start + self._row_tokens), side="right")
    out, stop = [], start + self._row_tokens + 1
    within = slice(first, last + 1)
    for number, end in zip(documents[within].tolist(), ends[within].tolist(), strict=True):
      begin = end - int(self._store.lengths[number])
      out.append((number, max(start, begin) - begin, min(stop, end) - begin))
    return out


class Window(NamedTuple):
  """A part of a document that is scored as one row.

  Attributes:
    document: its number in the store.
    start: its first token.
    stop: the token after its last.
    scored_from: the first token to be predicted; those before it are context only.
  """

  document: int
  start: int
  stop: int
  scored_from: int

  @property
  def positions(self) -> int:
    """Positions that a row needs for it: the last token is only predicted."""
    return self.stop - self.start - 1


def windows(lengths: Sequence[int], row_tokens: int, stride: int) -> Iterator[Window]:
  """Cuts every document into overlapping windows that predict each of its tokens exactly once.

  Args:
    lengths: tokens of each document.
    row_tokens: most positions of a window.
    stride: new predictions a window after a document's first, at most `row_tokens`.
  """
  for document, length in enumerate(map(int, lengths)):
    scored_from = 1  # BOS is given, never predicted
    for start in range(0, max(1, length - 1 - row_tokens + stride), stride):
      stop = min(length, start + row_tokens + 1)
      yield Window(document, start, stop, scored_from)
      scored_from = stop


def window_row(ids: np.ndarray, window: Window, row_tokens: int):
  """Cuts a window out of its document, as a padded row.

  Args:
    ids: int32 ids of the whole document.
    window: where to cut.
    row_tokens: positions of the row, `window.positions` or more.
  Returns:
    (tokens, segments, scored), each [row_tokens + 1]; `scored` is true where the token itself is to
    be predicted.
  """
  piece = ids[window.start : window.stop]
  pad = (0, row_tokens + 1 - len(piece))
  scored = np.arange(len(piece)) >= window.scored_from - window.start
  return tuple(np.pad(row, pad) for row in (piece, np.ones(len(piece), np.int32), scored))
