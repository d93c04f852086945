"""Packing: documents end to end in a shuffled order, cut into rows of equal length.

Any row is computed by itself from (seed, epoch, row number), on any host, and resuming needs only
the step number."""

import functools

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
    numbers, offset = self._span(index)
    pieces = [self._document(number) for number in numbers]
    pieces[0] = pieces[0][offset:]
    pieces[-1] = pieces[-1][: self._row_tokens + 1 - sum(map(len, pieces[:-1]))]
    segments = np.arange(1, len(pieces) + 1, dtype=np.int32)
    return np.concatenate(pieces), np.repeat(segments, list(map(len, pieces)))

  def documents(self, index: int) -> list[int]:
    """Lists the numbers of the documents that row `index` is made of."""
    return self._span(index)[0]

  def _span(self, index: int) -> tuple[list[int], int]:
    """The documents that a row overlaps, and the row's offset within the first of them."""
    epoch, index = divmod(int(index), self.rows_per_epoch)
    documents, ends, rows = self._order(epoch)
    start = int(rows[index]) * self._row_tokens
    first, last = np.searchsorted(ends, (start, start + self._row_tokens), side="right")
    numbers = documents[first : last + 1].tolist()
    return numbers, start - int(ends[first] - self._store.lengths[numbers[0]])


def windows(store: TokenStore, row_tokens: int, stride: int):
  """Cuts every document into overlapping rows that predict each of its tokens exactly once.

  Args:
    row_tokens: positions in a row.
    stride: new predictions a row after a document's first, at most `row_tokens`; the other
      positions are context only.
  Returns:
    An iterator over (tokens, segments, scored), each [row_tokens + 1]; `scored` is true where the
    token itself is to be predicted.
  """
  for index in range(len(store)):
    ids = store[index]
    done = 1  # BOS is given, never predicted
    for start in range(0, max(1, len(ids) - 1 - row_tokens + stride), stride):
      piece = ids[start : start + row_tokens + 1]
      pad = (0, row_tokens + 1 - len(piece))
      places = np.arange(start, start + row_tokens + 1)
      scored = (places >= done) & (places < len(ids))
      done = start + len(piece)
      yield np.pad(piece, pad), np.pad(np.ones(len(piece), np.int32), pad), scored
