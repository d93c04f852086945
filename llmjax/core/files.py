"""Files: JSON, atomic replacement, and clear errors for wrong paths and full disks."""

import contextlib
import json
import math
import os
import re
from pathlib import Path

from llmjax.core.errors import RunFailed, UserError

_FULL = re.compile("No space left on device|Disk quota exceeded|File too large")


def check_writable(name: str, path: str | Path):
  """Checks that a folder exists and is writable, or can be created.

  Args:
    name: what the path is for, as the message calls it.
    path: the folder; it need not exist.
  Raises:
    UserError: what is at the path, or at the nearest parent that exists.
  """
  folder = Path(path).expanduser().absolute()
  there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
  if there == folder:
    problem = f"{name} {str(path)!r}: it is"
  else:
    problem = f"{name} {str(path)!r} cannot be a folder: {str(there)!r} is"
  if not there.is_dir():
    raise UserError(f"{problem} {_kind(there)}, not a folder")
  if not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{problem} not writable")


def check_exists(name: str, path: str | Path, kind: str = "file"):
  """Checks that a `file` or a `folder` exists at a path.

  Raises:
    UserError: what is there instead.
  """
  there = _kind(Path(path))
  if not there:
    raise UserError(f"{name} {str(path)!r} does not exist")
  if there != f"a {kind}":
    raise UserError(f"{name} {str(path)!r} is {there}, not a {kind}")


def _kind(path: Path) -> str:
  """Names what is at a path; empty if nothing is."""
  if not os.path.lexists(path):
    return ""
  if not os.path.exists(path):
    return "a broken link"
  return "a folder" if path.is_dir() else "a file" if path.is_file() else "a special file"


def to_json(value, **options) -> str:
  """Writes a value as JSON, with null for NaN and infinities; `options` go to `json.dumps`."""
  return json.dumps(finite(value), allow_nan=False, **options)


def finite(value):
  """Returns a JSON value with None in place of each NaN and infinity."""
  if isinstance(value, dict):
    return {key: finite(each) for key, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(each) for each in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str):
  """Replaces a file atomically: a reader sees the old or the new content, also on a full disk."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    partial.write_text(text)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def report_full_disk():
  """Turns any library's error about a full disk into one sentence.

  Raises:
    RunFailed: an exception, or one that caused it, says that there is no space.
  """
  try:
    yield
  except (RunFailed, UserError):
    raise
  except Exception as error:
    if reason := full_disk(error):
      raise RunFailed(
        f"a file could not be written: {reason}; what was saved before is intact"
      ) from error
    raise


def full_disk(error: BaseException | None) -> str:
  """Finds the report of a full disk in an exception or its causes; empty if there is none."""
  while error:
    if found := _FULL.search(str(error)):
      return f"{found[0]} ({error.filename})" if getattr(error, "filename", None) else found[0]
    error = error.__cause__ or error.__context__
  return ""


def read_json(path: Path, kind: type = dict, default=None):
  """Reads a JSON object (or list); a `UserError` if it is damaged, or missing without a default."""
  if default is not None and not path.is_file():
    return default
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(value, kind):
    raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'array'}")
  return value


def write_json(path: Path, values: dict | list):
  """Writes a JSON value, a key a line."""
  path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
