"""Files that a run leaves: valid JSON, each one replaced as a whole; and disks that are full."""

import contextlib
import json
import math
import os
import re
from pathlib import Path

from llmjax.core.errors import RunFailed, UserError

_FULL = re.compile("No space left on device|Disk quota exceeded|File too large")


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


@contextlib.contextmanager
def told_if_full():
  """Says in one sentence that a disk is full, whichever library wrote.

  Raises:
    RunFailed: an exception or what it came from says that there is no space.
  """
  try:
    yield
  except (RunFailed, UserError):
    raise
  except Exception as error:
    if reason := full_disk(error):
      raise RunFailed(f"a file could not be written: {reason}; what was saved stands") from error
    raise


def full_disk(error: BaseException | None) -> str:
  """Reads in an exception, or what it came from, that a disk is full; empty if it says no such."""
  while error:
    if found := _FULL.search(str(error)):
      return f"{found[0]} ({error.filename})" if getattr(error, "filename", None) else found[0]
    error = error.__cause__ or error.__context__
  return ""
