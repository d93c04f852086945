"""Proves that a token store holds its texts, is found by its content, and is whole or absent."""

import dataclasses
import json
import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from llmjax.core import lock
from llmjax.core.errors import UserError
from llmjax.data import prepare as module
from llmjax.data.prepare import prepare, store_key
from llmjax.data.sources import Document
from llmjax.text.base import NONE, Settings
from llmjax.text.sentencepiece import SentencePiece

DOCUMENTS = [
  Document("s", "a.txt", "the quick brown fox\n" * 20),
  Document("s", "b.txt", "jumps over the ▁ lazy dög\n" * 15),
  Document("s", "c.txt", "x"),
]


@pytest.fixture(scope="module")
def tokenizer():
  return SentencePiece.train([document.text for document in DOCUMENTS], 290)


@pytest.mark.parametrize("cached", [True, False])
def test_documents_come_back_between_bos_and_eos(tmp_path, tokenizer, cached):
  before = os.umask(0o027)
  try:
    store = prepare(DOCUMENTS, tokenizer, tmp_path if cached else "")
  finally:
    os.umask(before)
  modes = [path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")]
  assert sorted(modes) == ([0o640, 0o640, 0o640, 0o750] if cached else [])
  assert len(store) == 3
  for index, document in enumerate(DOCUMENTS):
    ids = store[index]
    assert ids.dtype == np.int32
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids[1:-1]) == document.text
    assert store.lengths[index] == len(ids)
  assert store.size_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)


def test_without_bos_a_document_begins_with_eos(tmp_path, tokenizer):
  gpt2_like = SentencePiece(tokenizer.to_bytes(), Settings(bos_id=NONE))
  store = prepare(DOCUMENTS, gpt2_like, tmp_path)
  for number, document in enumerate(DOCUMENTS):
    assert store[number].tolist() == [2, *tokenizer.encode(document.text), 2]


def test_without_eos_nothing_is_written(tmp_path, tokenizer):
  endless = SentencePiece(tokenizer.to_bytes(), Settings(eos_id=NONE))
  with pytest.raises(UserError, match="no EOS"):
    prepare(DOCUMENTS, endless, tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_more_documents_than_a_chunk_keep_their_order(tmp_path, tokenizer):
  many = [Document("s", str(n), f"number {n}") for n in range(600)]
  store = prepare(many, tokenizer, tmp_path)
  for n in (0, 255, 256, 511, 512, 599):
    assert tokenizer.decode(store[n][1:-1]) == f"number {n}"


def test_the_same_content_is_never_tokenized_twice(tmp_path, tokenizer, monkeypatch):
  first = prepare(DOCUMENTS, tokenizer, tmp_path)

  def refuse(*_):
    raise AssertionError("tokenized again")

  monkeypatch.setattr(module, "_write", refuse)
  again = prepare(list(DOCUMENTS), SentencePiece(tokenizer.to_bytes()), tmp_path)
  assert again.key == first.key == os.listdir(tmp_path)[0]
  assert_array_equal(again[1], first[1])


def test_the_key_changes_with_text_path_order_and_tokenizer(tokenizer):
  texts = [document.text for document in DOCUMENTS]
  changed = [
    (DOCUMENTS, SentencePiece.train(texts, 291)),
    (DOCUMENTS[::-1], tokenizer),
    (DOCUMENTS[:2], tokenizer),
    ([dataclasses.replace(DOCUMENTS[0], text="y"), *DOCUMENTS[1:]], tokenizer),
    ([dataclasses.replace(DOCUMENTS[0], path="d.txt"), *DOCUMENTS[1:]], tokenizer),
  ]
  keys = {store_key(*both) for both in changed} | {store_key(DOCUMENTS, tokenizer)}
  assert len(keys) == 6


def test_the_key_tells_where_one_document_ends_and_the_next_begins(tokenizer):
  one = [Document("s", "p", "ab"), Document("s", "q", "c")]
  other = [Document("s", "p", "a"), Document("s", "q", "bc")]
  assert store_key(one, tokenizer) != store_key(other, tokenizer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_write_leaves_no_store_and_no_rubbish(tmp_path, tokenizer, error):
  class Breaks:
    """The tokenizer, giving up at the second chunk, when the first is on its way to disk."""

    kind, bos_id, eos_id, to_bytes = "sentencepiece", 1, 2, tokenizer.to_bytes
    settings = tokenizer.settings
    calls = 0

    def encode_batch(self, texts):
      self.calls += 1
      if self.calls == 2:
        assert os.listdir(tmp_path)  # something is half written
        raise error
      return tokenizer.encode_batch(texts)

  many = [Document("s", str(n), "text") for n in range(300)]
  with pytest.raises(type(error) if isinstance(error, OSError) else error):
    prepare(many, Breaks(), tmp_path)
  assert os.listdir(tmp_path) == []
  assert len(prepare(many, tokenizer, tmp_path)) == 300


def test_a_store_that_another_process_finished_first_is_used(tmp_path, tokenizer, monkeypatch):
  write = module._write

  def write_while_another_finishes(documents, tokenizer, folder):
    monkeypatch.setattr(module, "_write", write)
    prepare(documents, tokenizer, tmp_path)
    write(documents, tokenizer, folder)

  monkeypatch.setattr(module, "_write", write_while_another_finishes)
  store = prepare(DOCUMENTS, tokenizer, tmp_path)
  assert len(store) == 3
  assert os.listdir(tmp_path) == [store.key]


def test_what_a_killed_maker_left_is_removed_and_what_a_living_one_writes_is_not(
  tmp_path, tokenizer
):
  left = {
    "killed": lock.identity() | {"born": "1"},
    "alive": lock.identity(),
    "elsewhere": lock.identity() | {"machine": "another", "born": "1"},
  }
  for name, owner in left.items():
    folder = tmp_path / f".{name}-x"
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps(owner))
    (folder / "tokens.array_record").write_bytes(b"half")
  store = prepare(DOCUMENTS, tokenizer, tmp_path)
  found = {path.name for path in tmp_path.iterdir()}
  assert found == {".alive-x", ".elsewhere-x", store.key}
  assert {path.name for path in (tmp_path / store.key).iterdir()} == {
    "lengths.npy", "meta.json", "tokens.array_record"
  }
