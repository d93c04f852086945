"""Proves that targets are shifted once, that only predictions within a document count, and that
tasks that hide tokens lose none and give none away.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from llmjax.core.errors import UserError
from llmjax.data.tasks import (
  SENTINELS,
  Task,
  TaskConfig,
  language_model,
  marks_of,
  score_only,
  segment_positions,
)
from llmjax.text.base import PLAIN, Tokenizer
from tests.reference.spans import spans_of

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
  kinds = {name: array.dtype for name, array in vars(batch).items() if array is not None}
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


VOCAB = 50


def row(*lengths, width, seed=0):
  """A row of `width + 1` random tokens: documents of these lengths, then padding."""
  segments = np.zeros(width + 1, np.int32)
  ends = np.cumsum([0, *lengths])
  for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
    segments[start:end] = number
  tokens = np.random.default_rng(seed).integers(1, VOCAB, width + 1).astype(np.int32)
  return tokens * (segments > 0), segments


def make(name, *rows, seeds=None, **values):
  task = Task(TaskConfig(name, **values), VOCAB, start=3)
  tokens, segments = map(np.stack, zip(*rows, strict=True))
  return task.batch(tokens, segments, seeds or [(0, number) for number in range(len(rows))])


@pytest.mark.parametrize("name", ["prefix_lm", "masked_lm", "span_corruption"])
def test_draws_are_a_function_of_the_rows_seed_alone(name):
  one, other = row(40, 23, width=63), row(64, width=63, seed=1)
  together = make(name, one, other, seeds=[(5, 1), (5, 2)])
  alone = make(name, other, seeds=[(5, 2)])
  again = make(name, other, seeds=[(5, 3)])
  for key, array in vars(alone).items():
    if array is not None:
      assert_array_equal(vars(together)[key][1:], array, err_msg=key)
  drawn = "prefix_bt" if name == "prefix_lm" else "targets_bt"
  drawn = "loss_mask_bt" if name == "masked_lm" else drawn
  assert (vars(again)[drawn] != vars(alone)[drawn]).any()


def test_a_prefix_is_part_of_its_document_and_not_predicted():
  sizes = set()
  for seed in range(200):
    tokens, segments = row(9, 1, 20, width=40)
    batch = make("prefix_lm", (tokens, segments), seeds=[(seed,)])
    for number, length in ((1, 9), (3, 20)):
      here = batch.segments_bt[0] == number
      prefix = batch.prefix_bt[0][here]
      size = int(prefix.sum())
      assert 1 <= size < length and prefix[:size].all()
      # The last token of the prefix predicts the first one after it.
      assert_array_equal(np.flatnonzero(batch.loss_mask_bt[0][here]), range(size - 1, length - 1))
      sizes.add((number, size))
    assert not batch.prefix_bt[0][batch.segments_bt[0] == 0].any()
    assert_array_equal(batch.targets_bt, language_model(tokens[None], segments[None]).targets_bt)
  assert sizes >= {(1, size) for size in range(1, 9)}  # every split occurs


def test_masked_tokens_are_replaced_as_bert_does():
  rows = [row(400, 100, width=600, seed=seed) for seed in range(20)]
  batch = make("masked_lm", *rows, mask_prob=0.2)
  tokens = np.stack([tokens for tokens, _ in rows])[:, :-1]
  assert_array_equal(batch.targets_bt, tokens)
  hidden, real = batch.loss_mask_bt > 0, batch.segments_bt > 0
  assert not hidden[~real].any()
  assert_array_equal(batch.tokens_bt[~hidden], tokens[~hidden])
  masked = (batch.tokens_bt == VOCAB)[hidden].mean()
  kept = (batch.tokens_bt == tokens)[hidden].mean()
  count = hidden.sum()
  # Binomial shares, within five standard deviations; a random token is the old one in 1 of VOCAB.
  for share, expected, n in (
    (hidden[real].mean(), 0.2, real.sum()), (masked, 0.8, count), (kept, 0.1 + 0.1 / VOCAB, count)
  ):
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n)
  assert batch.tokens_bt.max() == VOCAB
  assert Task(TaskConfig("masked_lm"), VOCAB).extra_tokens == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
  hidden=st.floats(0.01, 0.5),
  span=st.floats(1, 8),
  seed=st.integers(0, 9),
)
def test_spans_put_back_give_the_document(lengths, hidden, span, seed):
  width = sum(lengths) + 3
  tokens, segments = row(*lengths, width=width, seed=seed)
  batch = make("span_corruption", (tokens, segments), seeds=[(seed,)], mask_prob=hidden, span=span)
  long = [number for number, length in enumerate(lengths, 1) if length >= 16]
  assert batch.segments_bt.max() == batch.source_segments_bs.max() == len(long)
  for place, number in enumerate(long, 1):
    source = batch.source_bs[0][batch.source_segments_bs[0] == place]
    here = batch.segments_bt[0] == place
    target, given_ = batch.targets_bt[0][here], batch.tokens_bt[0][here]
    assert_array_equal(given_, [3, *target[:-1]])
    assert batch.loss_mask_bt[0][here].all()
    spans, current = {}, None
    for token in target:
      if token >= VOCAB:
        assert token == VOCAB + len(spans)  # sentinels count up from the first
        current = spans.setdefault(int(token), [])
      else:
        current.append(int(token))
    assert spans.pop(VOCAB + len(spans) - 1) == []  # the last one ends the target
    assert all(spans.values())
    whole = [piece for token in source for piece in spans.pop(int(token), [int(token)])]
    assert not spans
    assert_array_equal(whole, tokens[segments == number])
    gone = len(whole) - (source < VOCAB).sum()
    assert gone == max(1, min(round(len(whole) * hidden), len(whole) // 2))
    assert target.max() < VOCAB + SENTINELS
  assert not batch.loss_mask_bt[0][batch.segments_bt[0] == 0].any()


def spans_and_shown(batch, sentinels):
  """Reads the rows back: lengths of the hidden spans, and of what is shown before each."""
  hidden, shown = [], []
  for numbers, targets, other_numbers, source in zip(
    batch.segments_bt, batch.targets_bt, batch.source_segments_bs, batch.source_bs, strict=True
  ):
    for number in range(1, numbers.max() + 1):
      for ids, lengths in (
        (targets[numbers == number], hidden), (source[other_numbers == number], shown)
      ):
        places = np.flatnonzero(np.isin(ids, sentinels))
        assert ids[places].tolist() == list(sentinels[: len(places)])
        first = places if lengths is hidden else np.concatenate([[-1], places])
        lengths += (np.diff(first) - 1).tolist()
  return np.array(hidden), np.array(shown)


@pytest.mark.parametrize("length", [64, 512, 1981, 1982, 4096, 16_384])
def test_spans_have_t5s_mean_length_at_every_length(length):
  batch = make("span_corruption", row(length, width=length))
  hidden, shown = spans_and_shown(batch, range(VOCAB, VOCAB + SENTINELS))
  windows = int(batch.segments_bt.max())
  assert windows == (1 if length < 1982 else -(-length // 1983))
  rng = np.random.default_rng(1)
  parts = [spans_of((length + n) // windows, 0.15, 3.0, rng) for n in range(windows)]
  assert len(hidden) == sum(len(gone) for gone, _ in parts)
  assert hidden.sum() == sum(sum(gone) for gone, _ in parts)
  assert hidden.sum() + shown.sum() == length
  # The number of spans is rounded, once a window.
  assert abs(hidden.sum() / 3 - len(hidden)) <= 0.5 * windows


def test_spans_are_distributed_as_in_t5s_recipe():
  batch = make("span_corruption", *[row(200, width=200)] * 400)
  made = spans_and_shown(batch, range(VOCAB, VOCAB + SENTINELS))
  rng = np.random.default_rng(7)
  drawn = [spans_of(200, 0.15, 3.0, rng) for _ in range(400)]
  for ours, theirs in zip(made, zip(*drawn, strict=True), strict=True):
    theirs = np.concatenate(theirs)
    edges = np.unique(np.quantile(theirs, np.linspace(0, 1, 12)))
    one, other = np.histogram(ours, edges)[0], np.histogram(theirs, edges)[0]
    # Chi-squared of two samples; spans of a row are not quite independent, which makes it smaller.
    chi2 = ((one - other) ** 2 / (one + other)).sum()
    freedom = len(edges) - 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("marks", [(), (VOCAB + 9, VOCAB + 8), tuple(range(90, 70, -1))])
@pytest.mark.parametrize("hidden", [0.001, 0.15, 1 / 3, 0.5])
@pytest.mark.parametrize("span", [1.0, 1.5, 3.0, 1e9])
def test_no_length_fails_and_no_target_outgrows_its_row(marks, hidden, span):
  config = TaskConfig("span_corruption", hidden, span)
  task = Task(config, VOCAB, marks=marks)
  for width in (*range(16, 34), 64, 150):
    lengths = [width], [16] * (width // 16), [17] * max(1, width // 17), [5, width - 5]
    lengths = [some for some in lengths if sum(some) <= width]
    rows = [row(*some, width=width) for some in lengths]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    batch = task.batch(tokens, segments, [(0, n) for n in range(len(rows))])
    assert batch.loss_mask_bt[0].any()
    if span == 1.0:
      assert (spans_and_shown(batch, task.marks)[0] == 1).all()


def test_ids_that_stand_for_what_is_hidden_are_the_tokenizers_own():
  t5 = Tokenizer(b"", PLAIN, 32_100, {f"<extra_id_{n}>": 32_099 - n for n in range(100)})
  bert = Tokenizer(b"", PLAIN, 30_522, {"[PAD]": 0, "[MASK]": 103})
  bart = Tokenizer(b"", PLAIN, 50_265, {"<mask>": 50_264})
  assert marks_of("span_corruption", t5) == tuple(range(32_099, 31_999, -1))
  assert (marks_of("masked_lm", bert), marks_of("masked_lm", bart)) == ((103,), (50_264,))
  mt5 = Tokenizer(b"", PLAIN, 250_100, {f"▁<extra_id_{n}>": 250_099 - n for n in range(100)})
  assert marks_of("span_corruption", mt5) == tuple(range(250_099, 249_999, -1))
  assert marks_of("masked_lm", t5) == marks_of("span_corruption", bert) == ()
  assert marks_of("language_model", bert) == ()

  task = Task(TaskConfig("span_corruption"), 32_100, marks=marks_of("span_corruption", t5))
  assert task.extra_tokens == 0
  tokens, segments = row(100, width=100)
  batch = task.batch(tokens[None], segments[None], [(0,)])
  assert batch.targets_bt[0, 0] == 32_099 and 32_098 in batch.targets_bt
  assert 32_099 in batch.source_bs and batch.source_bs.max() < 32_100

  task = Task(TaskConfig("masked_lm"), 30_522, marks=(103,))
  batch = task.batch(tokens[None], segments[None], [(0,)])
  assert task.extra_tokens == 0 and (batch.tokens_bt == 103).any()
  assert Task(TaskConfig("masked_lm"), VOCAB, marks=(VOCAB + 4,)).extra_tokens == 5
  with pytest.raises(UserError, match="needs two sentinels or more"):
    Task(TaskConfig("span_corruption"), VOCAB, marks=(3,))


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "guess"}, "task.name 'guess' is unknown"),
    ({"mask_prob": 0.6}, r"task.mask_prob 0.6 is not in \(0, 0.5\]"),
    ({"span": 0.5}, "task.span 0.5 is less than 1"),
  ],
)
def test_what_makes_no_sense_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    TaskConfig(**values)
