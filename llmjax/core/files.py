"""Files that a run leaves: valid JSON, and each one replaced as a whole."""

import json
import math
import os
from pathlib import Path


def to_json(value, **options) -> str:
  """Writes a value as JSON, in which NaN and the infinities have no place: they become null.

  Args:
    value: dicts, lists, tuples, numbers, strings.
    options: of `json.dumps`.
  """
  return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value):
  if isinstance(value, dict):
    return {key: _plain(each) for key, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(each) for each in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str):
  """Replaces a file as a whole: a reader sees the old one or the new one, also on a full disk."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    partial.write_text(text)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
