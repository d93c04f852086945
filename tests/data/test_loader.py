"""Proves that batches are a function of (seed, step), wherever a run resumes, and placed right."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llmjax.data import loader
from llmjax.data.pack import PackedRows
from llmjax.data.prepare import TokenStore
from llmjax.data.sources import Document
from llmjax.data.tasks import Task, language_model
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.text.tokenizer import TokenizerConfig

BATCH = 4


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  documents = [rng.integers(3, 90, length).astype("<u4") for length in rng.integers(5, 60, 30)]
  lengths = np.array([len(ids) for ids in documents], np.int64)
  return PackedRows(TokenStore("k", lengths, 0, [ids.tobytes() for ids in documents]), 16, seed=5)


@pytest.fixture(scope="module")
def sharding():
  return batch_sharding(make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def assert_same(batch, other):
  for name, array in vars(batch).items():
    assert_array_equal(array, getattr(other, name), err_msg=name)


def test_batches_hold_the_rows_of_their_steps_in_order(rows, sharding):
  steps = 2 * rows.rows_per_epoch // BATCH  # into the second epoch
  seen = 0
  for step, batch in enumerate(loader.batches(rows, Task(), sharding, BATCH, 0, steps)):
    made = [rows[step * BATCH + row] for row in range(BATCH)]
    assert_same(batch, language_model(*(np.stack(part) for part in zip(*made, strict=True))))
    assert batch.tokens_bt.sharding == sharding
    seen += 1
  assert seen == steps


@pytest.mark.parametrize("start", [1, 7, 11])
def test_a_run_that_resumes_sees_the_tail_of_the_whole_one(rows, sharding, start):
  whole = list(loader.batches(rows, Task(), sharding, BATCH, 0, 12, read_ahead=3))
  tail = list(loader.batches(rows, Task(), sharding, BATCH, start, 12, read_ahead=1))
  assert len(tail) == 12 - start
  for batch, other in zip(tail, whole[start:], strict=True):
    assert_same(batch, other)


def test_a_finished_run_has_no_batches_left(rows, sharding):
  assert list(loader.batches(rows, Task(), sharding, BATCH, 12, 12)) == []


def test_a_process_makes_the_rows_that_its_devices_hold(rows, sharding, monkeypatch):
  [whole] = loader.batches(rows, Task(), sharding, BATCH, 3, 4)
  monkeypatch.setattr(loader, "local_rows", lambda *_: [1, 3])  # as in one of two processes
  monkeypatch.setattr(loader, "place", lambda batch, *_: batch)
  [own] = loader.batches(rows, Task(), sharding, BATCH, 3, 4)
  assert_array_equal(own.tokens_bt, np.asarray(whole.tokens_bt)[[1, 3]])


def test_one_process_holds_all_rows(sharding):
  assert loader.local_rows(sharding, 6) == [0, 1, 2, 3, 4, 5]


def test_placing_a_part_puts_rows_where_their_numbers_say(rows, sharding):
  made = [rows[row] for row in (2, 0, 1)]
  part = language_model(*(np.stack(column) for column in zip(*made, strict=True)))
  placed = loader.place(part, sharding, rows=[2, 0, 1], batch_size=3)
  assert_array_equal(placed.tokens_bt[2], part.tokens_bt[0])
  assert_array_equal(placed.tokens_bt[0], part.tokens_bt[1])
  assert_same(loader.place(part, sharding), part)


def test_the_tokenizer_is_trained_on_an_even_share_of_every_document(monkeypatch):
  seen = []
  monkeypatch.setattr(loader, "train_tokenizer", lambda config, texts: seen.extend(texts))
  documents = [Document("s", "a", "x" * 1000), Document("s", "b", "y" * 500)]
  loader.make_tokenizer(TokenizerConfig(train_bytes=150), documents)
  assert seen == ["x" * 100, "y" * 50]
  seen.clear()
  loader.make_tokenizer(TokenizerConfig(train_bytes=10_000), documents)
  assert seen == [document.text for document in documents]
