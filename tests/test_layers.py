"""Imports go only down the layers, and files, functions and the config stay small."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "llmjax"

# Top to bottom, as in docs/layers.md. Packages on one line do not import each other.
LAYERS = [
  {"__main__"},
  {"cli"},
  {"bench"},
  {"__init__"},
  {"convert", "data_show"},
  {"run"},
  {"model"},
  {"planning"},
  {"eval"},
  {"serve"},
  {"training"},
  {"formats"},
  {"models"},
  {"nn"},
  {"data"},
  {"text"},
  {"parallel"},
  {"core"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def _package(module: str) -> str:
  parts = module.split(".")
  if len(parts) == 1:
    return "__init__"
  return parts[1]


def _imports():
  for path in sorted(PACKAGE.rglob("*.py")):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    for node in ast.walk(ast.parse(path.read_text())):
      modules = []
      if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{relative} uses a relative import"
        modules = [node.module]
        if node.module == "llmjax":  # `from llmjax import run` is a module, `load` a name of ours
          modules = [f"llmjax.{a.name}" if a.name in LEVEL else "llmjax" for a in node.names]
      elif isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      for module in modules:
        if module.split(".")[0] == "llmjax":
          yield relative, here, _package(module)


def package_imports() -> set[tuple[str, str]]:
  """Lists every pair of packages of which the first imports the second."""
  return {(importing, imported) for _, importing, imported in _imports()}


def test_every_package_has_a_layer():
  packages = {path.stem for path in PACKAGE.glob("*.py")}
  packages |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert packages == set(LEVEL)


def test_imports_only_go_down():
  checked = 0
  for relative, here, there in _imports():
    checked += 1
    assert here == there or LEVEL[there] > LEVEL[here], f"{relative} imports {there} from below it"
  assert checked > 50


def test_files_and_functions_stay_small():
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert text.count("\n") < 400, f"{path} is due for a redesign"
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 80, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_files_open_with_what_and_why():
  for path in PACKAGE.rglob("*.py"):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_public_functions_have_docstrings():
  for path in PACKAGE.rglob("*.py"):
    for node in ast.parse(path.read_text()).body:
      public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
      assert not public or ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


def test_config_stays_small():
  import dataclasses

  from llmjax.core.config import flat
  from llmjax.training.config import Config

  others = ("eval.", "sample.")  # sections of other verbs, which score and write
  assert len([key for key in flat(Config()) if not key.startswith(others)]) <= 150
  for field in dataclasses.fields(Config):
    section = getattr(Config(), field.name)
    if dataclasses.is_dataclass(section):
      own = [key for key in vars(section).values() if not dataclasses.is_dataclass(key)]
      assert len(own) <= 20, field.name
