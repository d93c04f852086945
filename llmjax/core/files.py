"""Files: those that a run leaves, disks that are full, and paths of the wrong kind."""

import contextlib
import json
import math
import os
import re
from pathlib import Path

from llmjax.core.errors import RunFailed, UserError

_FULL = re.compile("No space left on device|Disk quota exceeded|File too large")


def check_place(name: str, path: str | Path):
  """Refuses a folder to be written to that is none, or that cannot be made or written.

  Args:
    name: of what is to be there, for the message.
    path: the folder; it need not exist.
  Raises:
    UserError: what stands in the way, and what it is.
  """
  place = Path(path).expanduser().absolute()
  there = next(one for one in (place, *place.parents) if os.path.lexists(one))
  said = f"{name} {str(path)!r} cannot be a folder" if there != place else f"{name} {str(path)!r}"
  where = "it" if there == place else repr(str(there))
  if not there.is_dir():
    raise UserError(f"{said}: {where} is {_what(there)}, not a folder")
  if not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{said}: {where} is not writable")


def check_file(name: str, path: str | Path):
  """Refuses a path where no file is: there is nothing, or a folder.

  Raises:
    UserError: what is there.
  """
  if not Path(path).is_file():
    raise UserError(f"{name} {str(path)!r} {_absent(Path(path), 'file')}")


def check_folder(name: str, path: str | Path):
  """Refuses a path where no folder is: there is nothing, or a file.

  Raises:
    UserError: what is there.
  """
  if not Path(path).is_dir():
    raise UserError(f"{name} {str(path)!r} {_absent(Path(path), 'folder')}")


def _absent(path: Path, wanted: str) -> str:
  return f"is {_what(path)}, not a {wanted}" if os.path.lexists(path) else "does not exist"


def _what(path: Path) -> str:
  if path.is_symlink() and not path.exists():
    return "a broken link"
  return "a folder" if path.is_dir() else "a file" if path.is_file() else "a special file"


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


def read_json(path: Path, kind: type = dict):
  """Reads a JSON object (or a list); a missing or damaged file is a `UserError`."""
  try:
    made = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(made, kind):
    raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'array'}")
  return made


def write_json(path: Path, values: dict | list):
  """Writes a JSON value, a key a line."""
  path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
