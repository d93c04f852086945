"""T5's span corruption, slow: which tokens are hidden, drawn one border at a time.

Source: Raffel et al. 2019, arXiv:1910.10683, sec. 3.1.4, and the recipe published with it: counts
are rounded, what is shown comes first, and borders between parts lie anywhere with equal chance.
"""


def spans_of(length: int, share: float, mean: float, rng) -> tuple[list[int], list[int]]:
  """Draws the lengths of a document's hidden spans and of what is shown before each."""
  hidden = max(1, round(length * share))
  count = max(1, round(hidden / mean))
  return _parts(hidden, count, rng), _parts(length - hidden, count, rng)


def _parts(total: int, count: int, rng) -> list[int]:
  borders = [1] * (count - 1) + [0] * (total - count)
  rng.shuffle(borders)
  lengths = [1]
  for border in borders:
    if border:
      lengths.append(1)
    else:
      lengths[-1] += 1
  return lengths
