"""Packing in plain Python: all documents of an epoch end to end in one list, cut into rows."""

import numpy as np


def packed_rows(documents, row_tokens, seed, epoch):
  """Lists an epoch's rows as (tokens, segments), lists of `row_tokens + 1`.

  The order is part of the contract: a generator seeded with [seed, epoch] first permutes the
  documents, then the rows.
  """
  rng = np.random.default_rng([seed, epoch])
  stream = []
  for number in rng.permutation(len(documents)):
    for token in documents[number]:
      stream.append((int(number), int(token)))
  count = (len(stream) - 1) // row_tokens
  rows = []
  for row in rng.permutation(count):
    piece = stream[row * row_tokens : row * row_tokens + row_tokens + 1]
    segments = []
    for place, (number, _) in enumerate(piece):
      if place == 0:
        segments.append(1)
      else:
        segments.append(segments[-1] + (number != piece[place - 1][0]))
    rows.append(([token for _, token in piece], segments))
  return rows
