"""Tasks turn rows of tokens into a `Batch`: the one place that shifts targets, hides tokens and
decides which predictions count. Each row's draws depend on its own seed alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.text.base import Tokenizer

TASKS = ("language_model", "prefix_lm", "masked_lm", "span_corruption")
SENTINELS = 100  # ids that stand for hidden spans where the tokenizer has none, as many as T5's
_MASKS = ("[MASK]", "<mask>", "<|mask|>")
_SENTINELS = ("<extra_id_{}>", "▁<extra_id_{}>")  # of T5 and of mT5
_SHORTEST = 16  # tokens of a document in which spans are hidden; shorter ones are left out


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What is predicted.

  Attributes:
    name: language_model; prefix_lm (a document's rest, given a prefix of random length);
      masked_lm (BERT); span_corruption (T5); auto: what suits the model's kind and mask.
    mask_prob: share of tokens that masked_lm and span_corruption hide.
    span: mean tokens of a hidden span.
  """

  name: str = "auto"
  mask_prob: float = 0.15
  span: float = 3.0

  def __post_init__(self):
    check_fields("task", self, name=("auto", *TASKS), mask_prob="(0, 0.5]", span=1)


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with the ids it uses.

  Attributes:
    config: name (not auto) and probabilities.
    tokens: vocabulary size of the tokenizer.
    start: the decoder's start id (span_corruption).
    marks: the mask id, or at least two sentinel ids in the order of their use; by default new ids
      after the tokenizer's.
  """

  config: TaskConfig = TaskConfig(name="language_model")
  tokens: int = 0
  start: int = 0
  marks: Sequence[int] = ()

  def __post_init__(self):
    new = {"masked_lm": 1, "span_corruption": SENTINELS}.get(self.config.name, 0)
    marks = tuple(self.marks) or tuple(range(self.tokens, self.tokens + new))
    if self.config.name == "span_corruption" and len(marks) < 2:
      raise UserError(f"span_corruption needs two sentinels or more; the tokenizer has {marks}")
    object.__setattr__(self, "marks", marks)

  @property
  def extra_tokens(self) -> int:
    """Ids that the model needs beyond the tokenizer's."""
    return max(0, 1 + max(self.marks, default=-1) - self.tokens)

  def batch(self, tokens_bu: np.ndarray, segments_bu: np.ndarray, seeds) -> Batch:
    """Makes a batch of rows one token longer than it.

    Args:
      tokens_bu: int32 [b, t + 1] ids.
      segments_bu: int32 [b, t + 1] document numbers, 0 for padding.
      seeds: a sequence of ints for each row, which decides its draws.
    Returns:
      A numpy `Batch` of [b, t].
    """
    if self.config.name == "language_model":
      return language_model(tokens_bu, segments_bu)
    make = getattr(self, f"_{self.config.name}")
    rngs = map(np.random.default_rng, seeds)
    rows = [make(*row) for row in zip(tokens_bu, segments_bu, rngs, strict=True)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)

  def segment_ranges(self, segments_u: np.ndarray) -> list[tuple[int, int]]:
    """Finds where in a row each segment of its batch comes from.

    Args:
      segments_u: int32 [t + 1] document numbers of the row, 0 for padding.
    Returns:
      (first position, the position after the last) of segments 1, 2, …
    """
    shortest = _SHORTEST if self.config.name == "span_corruption" else 1
    out, start = [], 0
    for length in np.bincount(segments_u[:-1], minlength=1)[1:]:
      if length >= shortest:
        cuts = np.array_split(np.arange(start, start + length), self.windows(int(length)))
        out += [(int(cut[0]), int(cut[-1]) + 1) for cut in cuts]
      start += length
    return out

  def _prefix_lm(self, tokens_u, segments_u, rng) -> Batch:
    """Each document's first tokens, at least one and not all, are seen by all of it."""
    row = language_model(tokens_u, segments_u)
    lengths = np.bincount(row.segments_bt)
    splits = np.array([rng.integers(1, max(2, length)) for length in lengths])[row.segments_bt]
    known = row.positions_bt + 1 < splits  # the next token is itself in the prefix
    prefix = (row.positions_bt < splits) & (row.segments_bt > 0)
    return dataclasses.replace(row, prefix_bt=prefix, loss_mask_bt=row.loss_mask_bt * ~known)

  def _masked_lm(self, tokens_u, segments_u, rng) -> Batch:
    """Of the hidden tokens 80 % become the mask, 10 % any token, 10 % stay.

    Source: Devlin et al. 2018, arXiv:1810.04805, sec. 3.1.
    """
    row = language_model(tokens_u, segments_u)
    tokens_t = row.tokens_bt
    hidden = (rng.random(len(tokens_t)) < self.config.mask_prob) & (row.segments_bt > 0)
    how = rng.random(len(tokens_t))
    anything = rng.integers(0, self.tokens, len(tokens_t))
    shown = np.where(how < 0.8, self.marks[0], np.where(how < 0.9, anything, tokens_t))
    return dataclasses.replace(
      row,
      tokens_bt=np.where(hidden, shown, tokens_t).astype(np.int32),
      targets_bt=tokens_t,
      loss_mask_bt=hidden.astype(np.float32),
    )

  def _span_corruption(self, tokens_u, segments_u, rng) -> Batch:
    """Spans of each document are replaced by sentinels, and written out after them.

    A document that has more spans than there are sentinels is cut evenly into windows that each
    are a document of their own, so that the spans' mean length is what was asked for.

    Source: Raffel et al. 2019, arXiv:1910.10683, sec. 3.1.4.
    """
    t = len(tokens_u) - 1
    ranges = self.segment_ranges(segments_u)
    pairs = [self._corrupt(tokens_u[start:stop], rng) for start, stop in ranges]
    source_s, source_segments_s = _pad_row([source for source, _ in pairs], t)
    target_t, segments_t = _pad_row([target for _, target in pairs], self.target_width(t))
    positions_t = segment_positions(segments_t)
    given_t = np.where(positions_t == 0, self.start * (segments_t > 0), np.roll(target_t, 1))
    return Batch(
      tokens_bt=given_t.astype(np.int32),
      targets_bt=target_t,
      loss_mask_bt=(segments_t > 0).astype(np.float32),
      segments_bt=segments_t,
      positions_bt=positions_t,
      source_bs=source_s,
      source_segments_bs=source_segments_s,
      source_positions_bs=segment_positions(source_segments_s),
    )

  @functools.cache  # noqa: B019
  def target_width(self, t: int) -> int:
    """The most target positions that `t` source positions can need, as a multiple of 8, for meshes
    that divide positions: the largest ratio of targets to tokens of any window, times t."""
    needs = [self._spans(length) for length in range(1, t + 1)]
    longest = sum(spans < len(self.marks) for _, spans in needs)
    # Documents that must be cut are cut evenly, into windows of half the longest or more.
    shortest = min(_SHORTEST, t if longest == t else (longest + 1) // 2)
    lengths = range(shortest, longest + 1)
    most = max((1 + sum(needs[length - 1])) / length for length in lengths)
    return 8 * math.ceil(t * most / 8)

  def windows(self, length: int) -> int:
    """Counts the windows into which a document is cut, each with enough sentinels."""
    count = 1
    if self.config.name == "span_corruption":
      while self._spans(math.ceil(length / count))[1] >= len(self.marks):
        count += 1
    return count

  def _spans(self, length: int) -> tuple[int, int]:
    """(hidden tokens, spans) of a window."""
    hidden = max(1, min(round(length * self.config.mask_prob), length // 2))
    return hidden, max(1, round(hidden / self.config.span))

  def _corrupt(self, ids, rng):
    """(source, target with a last sentinel as its end) of a window."""
    hidden, spans = self._spans(len(ids))
    hidden_lengths = _partition(hidden, spans, rng)
    visible_lengths = _partition(len(ids) - hidden, spans, rng)
    lengths = np.stack([visible_lengths, hidden_lengths], axis=1)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    sentinels = [[i] for i in self.marks[: spans + 1]]
    source = itertools.chain(*zip(pieces[::2], sentinels, strict=False))
    target = itertools.chain(*zip(sentinels, pieces[1::2], strict=False), sentinels[spans:])
    return np.concatenate(list(source)), np.concatenate(list(target))


def marks_of(name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Finds a tokenizer's mask token (masked_lm) or its sentinels `<extra_id_0>`, `<extra_id_1>` …
  (span_corruption, T5's or mT5's); () where there are none."""
  if name == "masked_lm":
    special = tokenizer.special_tokens
    return tuple(special[mask] for mask in _MASKS if mask in special)[:1]
  if name == "span_corruption":
    for spelling in _SENTINELS:
      ids = map(tokenizer.find, map(spelling.format, itertools.count()))
      if found := tuple(itertools.takewhile(lambda i: i is not None, ids)):
        return found
  return ()


def _partition(total: int, parts: int, rng) -> np.ndarray:
  """Cuts `total` into `parts` positive numbers, all ways equally likely."""
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))


def _pad_row(pieces: list, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Concatenates pieces into a row padded with 0: (ids, segment numbers), int32."""
  ids, segments = np.zeros((2, width), np.int32)
  flat = np.concatenate([[], *pieces])
  ids[: len(flat)] = flat
  segments[: len(flat)] = np.repeat(np.arange(1, len(pieces) + 1), list(map(len, pieces)))
  return ids, segments


def language_model(tokens_bu: np.ndarray, segments_bu: np.ndarray) -> Batch:
  """Makes next-token prediction out of rows one token longer than the batch.

  Args:
    tokens_bu: int32 [b, t + 1] ids, or one row of them.
    segments_bu: int32 [b, t + 1] document numbers, 0 for padding.
  Returns:
    A numpy `Batch` of [b, t]; a prediction counts where the next token is of the same document.
  """
  inputs = segments_bu[..., :-1]
  same = (inputs == segments_bu[..., 1:]) & (inputs > 0)
  return Batch(
    tokens_bt=tokens_bu[..., :-1].astype(np.int32),
    targets_bt=np.where(same, tokens_bu[..., 1:], 0).astype(np.int32),
    loss_mask_bt=same.astype(np.float32),
    segments_bt=inputs.astype(np.int32),
    positions_bt=segment_positions(inputs),
  )


def score_only(tokens_bu: np.ndarray, segments_bu: np.ndarray, scored_bu: np.ndarray) -> Batch:
  """Makes `language_model`'s batch in which only predictions of tokens in `scored_bu` count."""
  batch = language_model(tokens_bu, segments_bu)
  return dataclasses.replace(batch, loss_mask_bt=batch.loss_mask_bt * scored_bu[:, 1:])


def segment_positions(segments_bt: np.ndarray) -> np.ndarray:
  """Counts each position from the start of its segment: [1, 1, 2, 2, 2] → [0, 1, 0, 1, 2]."""
  positions = np.arange(segments_bt.shape[-1], dtype=np.int32)
  starts = np.zeros_like(segments_bt, np.int32)
  starts[..., 1:] = positions[1:] * (segments_bt[..., 1:] != segments_bt[..., :-1])
  return positions - np.maximum.accumulate(starts, axis=-1)
