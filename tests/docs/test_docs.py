"""The pages tell the truth: links lead somewhere, code runs, commands parse, keys are all there.

A page that drifts from the code fails here, with the page and, where there is one, the line.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from docs.layer_plot import draw_layers
from llmjax.cli import _parse
from llmjax.core.config import flat, override
from llmjax.core.dims import LETTERS
from llmjax.training.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in PAGES if path.is_file()]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.M | re.S)
_LINK = re.compile(r"\]\(<?([^)\s>]+)|\b(?:href|src|srcset)=[\"']([^\"'\s]+)")
_URL = re.compile(r"\w+://\S+")
_FILE = re.compile(r"(?<![\w./-])((?:[\w.-]+/)+[\w-]+\.py)\b")
_PLACE = re.compile(r"`((?:llmjax|docs|tests|experiments|launch)/[\w./-]*)`")
_KEY = re.compile(r"--config\.([a-zA-Z_]\w*(?:\.\w+)*)")
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
  return [(match.start(2), match[2]) for match in _FENCE.finditer(text) if match[1] == language]


def _commands(text: str) -> list[tuple[int, list[str]]]:
  """Lists the `llmjax VERB …` lines of sh blocks as (place in the text, arguments)."""
  found = []
  for start, body in _blocks(text, "sh"):
    body = body.replace("\\\n", "  ")  # a continued line is one line, places kept
    for match in re.finditer(r"^(?:\$ )?(?:\S*/)?llmjax .*$", body, re.M):
      words = shlex.split(match[0].removeprefix("$ "), comments=True)
      found.append((start + match.start(), words[1:]))
  return found


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
  shown = (ROOT / "docs" / "house.svg").read_text()
  assert shown == draw_layers(), "docs/house.svg is out of date: run python -m docs.layer_plot"


def test_the_page_of_the_layers_names_every_file():
  text = (ROOT / "docs" / "house.md").read_text()
  for path in sorted((ROOT / "llmjax").rglob("*.py")):
    name = path.relative_to(ROOT).as_posix()
    holds_a_docstring = path.name == "__init__.py" and name != "llmjax/__init__.py"
    assert holds_a_docstring or f"`{name}`" in text, f"docs/house.md does not say what {name} holds"


def test_the_page_of_the_letters_explains_every_letter():
  explained = re.findall(r"`(\w)` \| [^|]+\|", (ROOT / "docs" / "alphabet.md").read_text())
  assert set(explained) >= set(LETTERS), f"not explained: {set(LETTERS) - set(explained)}"


@pytest.mark.parametrize(
  "page",
  # What the quickstart trains and samples, tests/test_run.py does as well.
  [pytest.param(p, marks=[pytest.mark.slow] * (p.name == "quickstart.md")) for p in PAGES],
  ids=[path.relative_to(ROOT).as_posix() for path in PAGES],
)
def test_python_runs(page, tmp_path, monkeypatch):
  """A page's python blocks run one after another, in one namespace and an empty folder."""
  text = page.read_text()
  source = ""
  for start, body in _blocks(text, "python"):
    # Blank lines stand for the prose, so that a traceback shows the page's own lines.
    source += "\n" * (text.count("\n", 0, start) - source.count("\n")) + body
  if not source:
    pytest.skip("no python on this page")
  monkeypatch.chdir(tmp_path)
  exec(compile(source, str(page), "exec"), {"__name__": "docs"})


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
  rows = _ROW.findall((ROOT / "docs" / "quickstart.md").read_text())
  shown = {key: ast.literal_eval(default) for key, default in rows}
  known = flat(Config())
  assert len(shown) == len(rows), "a key stands in the table twice"
  assert shown.keys() == known.keys(), f"keys that differ: {sorted(shown.keys() ^ known.keys())}"
  for key, default in known.items():
    same = type(shown[key]) is type(default) and shown[key] == default
    assert same, f"{key}: the table says {shown[key]!r}, the default is {default!r}"
