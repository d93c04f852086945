"""Proves that text is read exactly and in a fixed order, and that the held-out split is stable."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmjax.core.errors import UserError
from llmjax.data.sources import Document, path_hash, read_sources, split


def write(root, files):
  for name, data in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def test_a_folder_is_walked_in_order_with_hidden_and_empty_files_left_out(tmp_path):
  write(
    tmp_path,
    {"b.txt": "B", "a/z.txt": "Z", "a/a.txt": "A", ".hidden": "h", ".git/x": "g", "empty": ""},
  )
  found = read_sources(str(tmp_path))
  assert [(doc.path, doc.text) for doc in found] == [
    ("a/a.txt", "A"),
    ("a/z.txt", "Z"),
    ("b.txt", "B"),
  ]
  assert {doc.source for doc in found} == {str(tmp_path)}


def test_entries_keep_the_order_of_the_spec(tmp_path):
  write(tmp_path, {"one.txt": "1", "two/a.txt": "2"})
  spec = f" {tmp_path / 'two'} , {tmp_path / 'one.txt'},"
  assert [doc.text for doc in read_sources(spec)] == ["2", "1"]


def test_line_ends_and_every_character_are_as_on_disk(tmp_path):
  text = "a\r\nb\rc\n\u2028é👋\ufeff"
  write(tmp_path, {"x": text})
  (document,) = read_sources(str(tmp_path))
  assert document.text == text
  assert document.size_bytes == (tmp_path / "x").stat().st_size


def test_the_standard_library_is_a_source_without_tests_and_installed_packages():
  found = read_sources("stdlib")
  paths = [doc.path for doc in found]
  assert "dataclasses.py" in paths and paths == sorted(paths, key=lambda path: path.split("/"))
  skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
  assert not any(skipped & set(path.split("/")) for path in paths)


@pytest.mark.parametrize(
  ("files", "entry", "words"),
  [
    ({}, "nowhere", "'.*nowhere' does not exist"),
    ({"folder/empty": ""}, "folder", "holds no text"),
    ({"file": b"ab\xff"}, "file", "byte 2 is not UTF-8"),
    ({"file": b"a\xc3\xa9\0"}, "file", "byte 3 is NUL"),
  ],
)
def test_what_holds_no_text_is_a_user_error_that_says_why(tmp_path, files, entry, words):
  write(tmp_path, files)
  with pytest.raises(UserError, match=words):
    read_sources(str(tmp_path / entry))


@pytest.mark.parametrize("spec", ["", " , "])
def test_an_empty_spec_is_a_user_error(spec):
  with pytest.raises(UserError, match=r"data.sources is empty"):
    read_sources(spec)


def documents(count, text="some text\n" * 10):
  return [Document("s", f"folder/{n}.txt", text) for n in range(count)]


def test_the_split_of_many_documents_takes_whole_ones_by_the_hash_of_their_path():
  docs = documents(400)
  train, held_out = split(docs, 0.1)
  assert [doc for doc in docs if path_hash(doc) < 0.1] == held_out
  assert [doc for doc in docs if path_hash(doc) >= 0.1] == train
  # 400 draws at 10 %: mean 40, standard deviation 6; five of them away is no accident.
  assert 10 < len(held_out) < 70


def test_a_document_stays_on_its_side_whatever_else_there_is():
  docs = documents(400)
  before = {doc.path for doc in split(docs, 0.1)[1]}
  after = {doc.path for doc in split(docs[100:], 0.1)[1]}
  assert after == before & {doc.path for doc in docs[100:]}


def test_a_document_of_more_than_a_twentieth_of_the_text_is_never_held_out_whole():
  docs = documents(400)
  large = next(doc for doc in docs if path_hash(doc) < 0.1)
  docs[docs.index(large)] = Document("s", large.path, "x" * 100_000)
  train, held_out = split(docs, 0.1)
  assert large.path in {doc.path for doc in train}
  assert held_out


def test_the_path_hash_is_the_same_on_every_machine():
  # The first 8 bytes of SHA-256 of "abc" are ba7816bf8f01cfea, a number published in FIPS 180-2.
  assert path_hash(Document("s", "abc", "")) == 0xBA7816BF8F01CFEA / 2**64


@settings(deadline=None, max_examples=150)
@given(
  st.lists(st.text("ab\né", min_size=1, max_size=60), min_size=1, max_size=3),
  st.floats(0.01, 0.9),
)
def test_a_handful_of_documents_are_cut_and_nothing_is_lost_or_seen_twice(texts, share):
  docs = [Document("s", f"{n}", text) for n, text in enumerate(texts)]
  try:
    train, held_out = split(docs, share)
  except UserError as error:
    assert "too few" in str(error)
    assert all(int(len(text) * (1 - share)) == 0 for text in texts)
    return
  assert train and held_out and all(doc.text for doc in train + held_out)
  heads = {doc.path: doc.text for doc in train}
  tails = {doc.path: doc.text for doc in held_out}
  for doc in docs:
    assert heads.get(doc.path, "") + tails.get(doc.path, "") == doc.text


def test_a_single_document_is_cut_at_a_line_end():
  lines = [f"line {n}\n" for n in range(100)]
  (head,), (tail,) = split([Document("s", "p", "".join(lines))], 0.05)
  assert head.text.endswith("\n") and tail.text.startswith("line ")
  assert 3 <= tail.text.count("\n") <= 6
