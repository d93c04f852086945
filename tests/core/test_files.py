"""Proves that what is written is JSON as RFC 8259 has it, and that a file is replaced or left."""

import json

import pytest

from llmjax.core import files


def refuse(name):
  raise AssertionError(f"{name} is not JSON")


def test_numbers_that_json_lacks_become_null():
  nan, inf = float("nan"), float("inf")
  value = {"a": nan, "b": [1.5, inf, {"c": (-inf, 2, "NaN")}], "d": None, "e": True}
  read = json.loads(files.to_json(value, indent=1), parse_constant=refuse)
  assert read == {"a": None, "b": [1.5, None, {"c": [None, 2, "NaN"]}], "d": None, "e": True}


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  files.replace(path, "old")

  def full(self, text):
    self.touch()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(type(path), "write_text", full)
  with pytest.raises(OSError, match="No space"):
    files.replace(path, "new")
  monkeypatch.undo()
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
