"""The winner of a search as a change of the config file: what `git apply` and `patch -p1` take."""

import ast
import difflib
import os
import re
from pathlib import Path

from llmjax.core.config import flat, load
from llmjax.core.errors import UserError
from llmjax.training.config import Config


def patch(path: str, config: Config) -> str:
  """Writes the unified diff after which a config file's `get_config()` returns `config`.

  A value that the function sets on a line of its own, with nothing but such lines behind, is
  changed there; others are set before its `return`.

  Args:
    path: the config file.
    config: what it shall return.
  Returns:
    The diff, "" if nothing differs; paths below the working folder are relative to it.
  Raises:
    UserError: `get_config()` does not end in `return NAME`.
  """
  old, wanted = flat(load(path, [], Config)), flat(config)
  before = Path(path).read_text()
  lines = before.splitlines(keepends=True)
  name, last, places = _read(path, before)
  added = []
  for key in (key for key in wanted if wanted[key] != old[key]):
    if key in places:
      row, start, end = places[key]
      line = lines[row].encode()  # the parser counts bytes
      lines[row] = (line[:start] + _source(wanted[key]).encode() + line[end:]).decode()
    else:
      added.append(f"{name}.{key} = {_source(wanted[key])}\n")
  indent = re.match(r"\s*", lines[last])[0]
  lines[last:last] = [indent + line for line in added]
  shown = os.path.relpath(path)
  shown = Path(path).name if shown.startswith("..") else shown
  diff = difflib.unified_diff(
    before.splitlines(keepends=True), lines, f"a/{shown}", f"b/{shown}"
  )
  return "".join(
    line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff
  )


def _source(value) -> str:
  return f'"{value}"' if isinstance(value, str) else repr(value)


def _read(path: str, text: str) -> tuple[str, int, dict]:
  """Reads (the config's name, row of `return`, key → (row, start, end) of its value's bytes)."""
  body = next(
    node.body for node in ast.parse(text).body
    if isinstance(node, ast.FunctionDef) and node.name == "get_config"
  )
  if not isinstance(body[-1], ast.Return) or not isinstance(body[-1].value, ast.Name):
    raise UserError(f"{path}: a patch wants get_config() to end in `return config`, a bare name")
  name, places = body[-1].value.id, {}
  for node in body[:-1]:
    if not isinstance(node, ast.Assign) or len(node.targets) > 1:
      places.clear()  # it may change what was set before
      continue
    whole, _, key = ast.unparse(node.targets[0]).partition(".")
    places = {old: place for old, place in places.items() if not old.startswith(f"{key}.")}
    if whole == name and node.value.lineno == node.value.end_lineno:
      places[key] = node.value.lineno - 1, node.value.col_offset, node.value.end_col_offset
  return name, body[-1].lineno - 1, places
