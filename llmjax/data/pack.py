"""Packing: documents end to end in a shuffled order, cut into rows of equal length.

Every row can be computed by itself from (seed, epoch, row number), so nothing but the step number
is needed to resume, and any host can make any row.
"""

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
    documents, ends, start, stop = self._place(index)
    tokens, segments = [], []
    place = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
      ids = self._document(int(documents[place]))
      piece = ids[len(ids) - (int(ends[place]) - start) :][: stop - start]
      tokens.append(piece)
      segments.append(np.full(len(piece), len(segments) + 1, np.int32))
      start += len(piece)
      place += 1
    return np.concatenate(tokens), np.concatenate(segments)

  def documents(self, index: int) -> list[int]:
    """Lists the numbers of the documents that row `index` is made of."""
    documents, ends, start, stop = self._place(index)
    first, last = np.searchsorted(ends, (start, stop - 1), side="right")
    return documents[first : last + 1].tolist()

  def _place(self, index: int):
    """An epoch's documents in order, where each ends, and from where to where the row goes."""
    epoch, index = divmod(int(index), self.rows_per_epoch)
    documents, ends, rows = self._order(epoch)
    start = int(rows[index]) * self._row_tokens
    return documents, ends, start, start + self._row_tokens + 1


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
