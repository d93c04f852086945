"""Proves that the letters of weights, equations and layouts are those of `core/dims.py`, and listed
on the page of the alphabet."""

import ast
import re
from pathlib import Path

from llmjax.core.dims import LETTERS

ROOT = Path(__file__).parent.parent
EQUATION = re.compile(r"[a-z1]+(,[a-z1]+)+->[a-z1]*")


def _strings():
  """(file and line, letters) of weights' names, einsum equations and arguments of `shard`."""
  for path in sorted((ROOT / "llmjax").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
      text = node.value if isinstance(node, ast.Constant) else None
      if isinstance(text, str) and EQUATION.fullmatch(text):
        yield where, re.sub("[,>1-]", "", text)
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        texts = [text for text in texts if isinstance(text, str)]
        if node.func.id == "shard" and texts:
          yield where, texts[0].replace("1", "")
        if node.func.id == "param" and isinstance(node.args[2], ast.Constant):
          yield where, node.args[2].value.rsplit("_", 1)[-1]


def test_every_letter_is_in_the_alphabet():
  found = list(_strings())
  assert len(found) > 70  # the walk sees them: some 40 weights, 20 equations, 20 constraints
  wrong = [f"{where}: {letters}" for where, letters in found if set(letters) - LETTERS.keys()]
  assert not wrong, wrong


def test_every_letter_is_used_and_explained():
  page = (ROOT / "docs" / "alphabet.md").read_text()
  for letter in LETTERS:
    assert f"| `{letter}` |" in page, letter
