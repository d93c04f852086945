"""The pages tell the truth: links lead somewhere, code runs, commands parse, keys are all there.

A page that drifts from the code fails here, with the page and, where there is one, the line.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from docs.layer_plot import draw_layers
from llmjax.cli import _parse
from llmjax.core.config import flat, override
from llmjax.core.dims import LETTERS
from llmjax.training.config import Config
from tests.docs import ready, shrunk

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in PAGES if path.is_file()]

_FENCE = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```[ ]*$", re.M | re.S)
_LINK = re.compile(r"\]\(<?([^)\s>]+)|\b(?:href|src|srcset)=[\"']([^\"'\s]+)")
_URL = re.compile(r"\w+://\S+")
_FILE = re.compile(r"(?<![\w./-])((?:[\w.-]+/)+[\w-]+\.py)\b")
_PLACE = re.compile(r"`((?:llmjax|docs|tests|experiments|launch)/[\w./-]*)`")
_KEY = re.compile(r"--config\.([a-zA-Z_]\w*(?:\.\w+)*)")
_FILE_NAME = re.compile(r"# ([\w/]+\.py)\n")  # first line of a block that a page says to save
_ROW = re.compile(r"^\| `([\w.]+)` \| `([^`]*)` \| .+ \|$", re.M)

pages_of_today = pytest.mark.parametrize(  # the log names files and keys as they were
  "page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name
)
every_page = pytest.mark.parametrize(
  "page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES]
)


def _place(page: Path, text: str, at: int) -> str:
  return f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}"


def _blank(match) -> str:
  return re.sub(r"[^\n]", " ", match[0])


def _blocks(text: str, language: str) -> list[tuple[int, str]]:
  """Lists the fenced blocks of a language as (place of the body in the text, body)."""
  return [(match.start(3), match[3]) for match in _FENCE.finditer(text) if match[1] == language]


def _commands(text: str) -> list[tuple[int, list[str]]]:
  """Lists the `llmjax VERB …` commands of sh blocks as (place in the text, arguments)."""
  found = []
  for start, body in _blocks(text, "sh"):
    body = body.replace("\\\n", "  ")  # a continued line is one line, places kept
    for line in re.finditer(r"^.*\bllmjax .*$", body, re.M):
      lexer = shlex.shlex(line[0], posix=True, punctuation_chars=True)
      lexer.whitespace_split = True
      words = list(lexer)
      while "llmjax" in words:  # behind variables, or behind another command
        words = words[words.index("llmjax") + 1 :]
        end = next((i for i, word in enumerate(words) if set(word) <= set(";&|<>()")), len(words))
        found.append((start + line.start(), words[:end]))
  return found


def _runnable(text: str) -> list[tuple[int, str]]:
  """Lists the commands of sh blocks that can run anywhere: blocks that say what they need cannot.

  Returns:
    (place in the text, command), which may be several lines long.
  """
  found = []
  for match in _FENCE.finditer(text):
    if match[1] != "sh" or match[2].startswith("needs "):
      continue
    command, start = "", match.start(3)
    for line in match[3].splitlines(keepends=True):
      command += line
      try:
        words = shlex.split(command, comments=True)
      except ValueError:  # a quotation or a line that goes on
        continue
      if words and not line.endswith("\\\n"):
        found.append((start, command))
      if not line.endswith("\\\n"):
        start, command = start + len(command), ""
  return found


def _save_files(text: str, folder: Path):
  """Writes the python blocks that a page says to save under the name in their first line."""
  for _, body in _blocks(text, "python"):
    if name := _FILE_NAME.match(body):
      (folder / name[1]).write_text(body)


def _anchors(text: str) -> set[str]:
  """Names headings as links do: lower case, punctuation dropped, spaces to hyphens."""
  titles = re.findall(r"^#+ (.+?)\s*$", _FENCE.sub("", text), re.M)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_relative_links_lead_somewhere(page):
  text = page.read_text()
  prose = re.sub(r"`[^`\n]+`(?!\])", _blank, _FENCE.sub(_blank, text))
  for match in _LINK.finditer(prose):
    target, _, anchor = (match[1] or match[2]).partition("#")
    if re.match(r"[a-z][a-z+.-]*:", target):
      continue
    there = (page.parent / target).resolve() if target else page
    place = _place(page, text, match.start())
    assert there.is_relative_to(ROOT) and there.exists(), f"{place} links to {target}: not there"
    if anchor and there.suffix == ".md":
      assert anchor in _anchors(there.read_text()), f"{place} links to #{anchor}: no such heading"


@pages_of_today
def test_files_that_are_named_exist(page):
  text = _URL.sub(_blank, page.read_text())
  for match in [*_FILE.finditer(text), *_PLACE.finditer(text)]:
    there = (ROOT / match[1]).exists()
    assert there, f"{_place(page, text, match.start())} names {match[1]}: not there"


def test_the_picture_of_the_layers_shows_the_imports_there_are():
  shown = (ROOT / "docs" / "layers.svg").read_text()
  assert shown == draw_layers(), "docs/layers.svg is out of date: run python -m docs.layer_plot"


def test_the_page_of_the_layers_names_every_file():
  text = (ROOT / "docs" / "files.md").read_text()
  for path in sorted((ROOT / "llmjax").rglob("*.py")):
    name = path.relative_to(ROOT).as_posix()
    holds_a_docstring = path.name == "__init__.py" and name != "llmjax/__init__.py"
    assert holds_a_docstring or f"`{name}`" in text, f"docs/files.md does not say what {name} holds"


def test_the_page_of_the_letters_explains_every_letter():
  explained = re.findall(r"`(\w)` \| [^|]+\|", (ROOT / "docs" / "alphabet.md").read_text())
  assert set(explained) >= set(LETTERS), f"not explained: {set(LETTERS) - set(explained)}"


@pages_of_today
def test_a_page_is_short_and_opens_with_a_command(page):
  lines = page.read_text().splitlines()
  prose = [line for line in lines if not line.startswith("|")]
  assert len(prose) <= 160, f"{page.name}: {len(prose)} lines"
  if page.name != "plan-accuracy.md":
    code = any(line.startswith(("```sh", "```python")) for line in lines[:25])
    assert code, f"{page.name} does not open with a command"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder with all that commands and Python of pages refer to: a finished run, models, text."""
  return ready.prepare(tmp_path_factory.mktemp("docs"), ROOT)


def _copy(prepared: Path, folder: Path) -> Path:
  shutil.copytree(prepared, folder, symlinks=True, dirs_exist_ok=True)
  return folder


def _reads_a_run(page: Path) -> bool:
  return any('"runs/quickstart' in body for _, body in _blocks(page.read_text(), "python"))


def _is_slow(page: Path) -> bool:
  # What the quickstart trains and samples, tests/test_run.py does as well.
  return page.name == "quickstart.md" or _reads_a_run(page)


@pytest.mark.parametrize(
  "page",
  [pytest.param(p, marks=[pytest.mark.slow] * _is_slow(p)) for p in PAGES],
  ids=[path.relative_to(ROOT).as_posix() for path in PAGES],
)
def test_python_runs(page, tmp_path, monkeypatch, request):
  """A page's python blocks run one after another, in one namespace and an empty folder."""
  text = page.read_text()
  if _reads_a_run(page):
    _copy(request.getfixturevalue("prepared"), tmp_path)
  _save_files(text, tmp_path)
  source = ""
  for start, body in _blocks(text, "python"):
    # Blank lines stand for the prose, so that a traceback shows the page's own lines.
    source += "\n" * (text.count("\n", 0, start) - source.count("\n")) + body
  if not source:
    pytest.skip("no python on this page")
  monkeypatch.chdir(tmp_path)
  exec(compile(source, str(page), "exec"), {"__name__": "docs"})


def test_the_notebook_s_cells_compile():
  """`make test-oracle` runs them, with the real model (tests/oracle/test_notebook.py)."""
  cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  assert len(code) >= 8
  for body in code:
    compile(body, "tour.ipynb", "exec")


@pages_of_today
def test_shell_parses(page):
  for _, body in _blocks(page.read_text(), "sh"):
    parsed = subprocess.run(["bash", "-n"], input=body, text=True, capture_output=True)
    assert not parsed.returncode and not parsed.stderr, f"{page.name}: {parsed.stderr}\n{body}"


@pytest.mark.slow
@pytest.mark.parametrize(
  "page",
  [page for page in PAGES if page.name != "LOG.md" and _runnable(page.read_text())],
  ids=lambda page: page.name,
)
def test_commands_run(page, tmp_path, prepared, monkeypatch):
  """A page's commands run one after another in one folder, with `llmjax` as shrunk.py says.

  What needs a network, an accelerator or the project's folder says so in the fence of its block;
  programs that install or show something (`pip`, `tensorboard`) do nothing here.
  """
  text = page.read_text()
  _save_files(text, _copy(prepared, tmp_path))
  for folder in re.findall(r"--to=(\S+)", text):  # `convert` writes new folders only
    shutil.rmtree(tmp_path / folder, ignore_errors=True)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("llmjax.planning.plan.has_compiler", lambda: False)  # it takes minutes
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
  for start, command in _runnable(text):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if words[0] == "llmjax" and words[1] not in shrunk.OWN_PROCESS:
      status = shrunk.run(words[1:])
    else:
      status = subprocess.run(["bash", "-eu", "-c", command], timeout=600).returncode
    assert status == 0, f"{_place(page, text, start)}: {command}"


@every_page
def test_commands_parse(page):
  text = page.read_text()
  for start, words in _commands(text):
    try:
      args, overrides = _parse(words)
      override(Config(), overrides)
    except Exception as error:
      pytest.fail(f"{_place(page, text, start)} llmjax {shlex.join(words)}: {error}")
    assert args.verb != "generate" or not overrides, "generate takes no --config"


@pages_of_today
def test_config_keys_exist(page):
  text = page.read_text()
  for _, shown in _blocks(text, "text"):  # what commands print, errors among it
    text = text.replace(shown, _blank([shown]))
  for match in _KEY.finditer(text):
    assert match[1] in flat(Config()), f"{_place(page, text, match.start())}: {match[0]} is no key"


@every_page
def test_make_targets_exist(page):
  text = page.read_text()
  targets = re.findall(r"^\t?([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
  code = [*(body for _, body in _blocks(text, "sh")), *re.findall(r"`([^`\n]+)`", text)]
  for target in re.findall(r"^make ([a-z][\w-]*)", "\n".join(code), re.M):
    assert target in targets, f"{page.relative_to(ROOT)}: make {target}: no such target"


def test_key_table_is_the_config():
  rows = _ROW.findall((ROOT / "docs" / "config.md").read_text())
  shown = {key: ast.literal_eval(default) for key, default in rows}
  known = flat(Config())
  assert len(shown) == len(rows), "a key stands in the table twice"
  assert shown.keys() == known.keys(), f"keys that differ: {sorted(shown.keys() ^ known.keys())}"
  for key, default in known.items():
    same = type(shown[key]) is type(default) and shown[key] == default
    assert same, f"{key}: the table says {shown[key]!r}, the default is {default!r}"
