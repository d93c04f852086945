"""The texts in one file: all of it, or one field of each of its JSON Lines.

The file's name decides which: `.jsonl` and `.ndjson` hold records, and a further `.gz` is unpacked.
Its content decides whether it is text: a NUL byte, or bytes that are not UTF-8, say that it is not.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from llmjax.core.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
_HEAD_BYTES = 1 << 16  # a NUL byte in these is enough: a large binary file is not read whole
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # JSON can spell out NUL and single surrogates
_KINDS = {
  dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null",
}


class NotText(UserError):
  """A file is not UTF-8 text.

  Args:
    path: the file.
    reason: which byte says so.
  """

  def __init__(self, path: Path, reason: str):
    super().__init__(f"{str(path)!r} is not text: {reason}")
    self.reason = reason


def read_texts(path: Path, field: str) -> list[tuple[str, str]]:
  """Reads a file's texts, in order.

  Args:
    path: the file.
    field: which field of a JSON Lines record is its text.
  Returns:
    (place, text) of each: the place is "" for a whole file, and ":3" for the record in line 3.
  Raises:
    NotText: it is not UTF-8 text.
    UserError: it cannot be read, or a record is not JSON or lacks the field.
  """
  text = _decode(path, gzip.open if path.suffix == ".gz" else open)
  if not is_json_lines(path.name):
    return [("", text)]
  return list(_records(text.removeprefix("\ufeff"), field, str(path)))


def is_json_lines(name: str) -> bool:
  """Whether a file of this name holds JSON Lines."""
  return name.removesuffix(".gz").endswith(JSON_LINES)


def _decode(path: Path, opener) -> str:
  try:
    with opener(path, "rb") as file:
      data = file.read(_HEAD_BYTES)
      if b"\0" not in data:
        data += file.read()
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{str(path)!r} cannot be read: {reason}") from error
  if b"\0" in data:
    raise NotText(path, f"byte {data.index(0)} is NUL")
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise NotText(path, f"byte {error.start} is not UTF-8") from error


def _records(text: str, field: str, path: str) -> Iterator[tuple[str, str]]:
  for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand within a string
    if line.strip():
      yield f":{number}", _text_of(line, field, f"{path!r} line {number}")


def _text_of(line: str, field: str, place: str) -> str:
  """The text of a record; `place` is where it stands, for messages."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{place} is not JSON: {error.msg} (column {error.colno})") from error
  except RecursionError as error:
    raise UserError(f"{place} is not JSON that can be read: it is nested too deeply") from error
  if not isinstance(record, dict):
    raise UserError(f"{place} is {_kind(record)}, not a JSON object")
  if field not in record:
    there = ", ".join(map(repr, list(record)[:8])) or "none"
    raise UserError(f"{place} has no field {field!r} (data.text_field); its fields: {there}")
  text = record[field]
  if not isinstance(text, str):
    raise UserError(f"{place}: field {field!r} is {_kind(text)}, not a string")
  if wrong := _NO_TEXT.search(text):
    raise UserError(f"{place}: field {field!r} has the character U+{ord(wrong[0]):04X}, not text")
  return text


def _kind(value) -> str:
  return _KINDS.get(type(value), "a number")
