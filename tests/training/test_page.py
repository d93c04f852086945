"""`report.html`: what it shows is what the files say, as text, and it needs nothing but itself."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from llmjax.core.errors import UserError
from llmjax.core.files import to_json
from llmjax.training.page import charts, write_page
from tests.runs import tiny

EVIL = "<script>alert('a & b')</script>"


class _Page(HTMLParser):
  """The elements and the text of a page, as a browser reads them."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.attributes, self.texts, self.scripts = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.elements.append(tag)
    self.attributes += attributes

  def handle_data(self, data):
    (self.scripts if self.elements[-1:] == ["script"] else self.texts).append(data)


def _write(folder, steps=60, result=True):
  """A workdir without checkpoints, as of a run of so many steps; returns its lines of metrics."""
  folder.mkdir()
  lines = [
    {"step": step, "loss": 9 / step, "learning_rate": 1e-3, "grad_norm": 1.0 + step % 2,
     "tokens_per_s": 100.0 * step, "steps_s": 0.5, "data_wait_s": 0.25, "new_metric": 7.0 * step,
     "</script>": 1.0, "moe_load": [[1.0]]}
    for step in range(1, steps + 1)
  ]
  lines.insert(30, {"step": 30, "nats_per_token": 3.25, "evaluation_s": 5.0})
  (folder / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in lines))
  rows = [
    {"text": "training", "source": "all", "documents": 12, "tokens": 34567, "bytes": 98765},
    {"text": "training", "source": EVIL, "documents": 5, "tokens": 4321},
  ]
  (folder / "data.json").write_text(json.dumps(rows))
  (folder / "samples.txt").write_text(f"--- prompt: 'x'\n{EVIL}\n")
  if result:
    values = {"steps": 60, "nats_per_token": 2.5, "bits_per_byte": 1.625, "bytes": 4000}
    values |= {"tokens": 1000, "gzip_bits_per_byte": 2.125, "xz_bits_per_byte": 1.875}
    values |= {"tokenizer": {"exact_rate": 1.0}, "parameters": 123456}
    (folder / "result.json").write_text(json.dumps(values))
  return lines


def _read(path) -> _Page:
  return _Page(path.read_text())


def test_the_page_shows_the_files_as_text(tmp_path):
  folder = tmp_path / f"run {EVIL.replace('/', '')}"
  lines = _write(folder)
  config = tiny(EVIL, sample__prompts=("x", EVIL))
  path = write_page(folder, config)
  page, raw = _read(path), path.read_text()
  # What text says stays text: there are the page's own two scripts and nothing that is loaded.
  assert page.elements.count("script") == 2
  names = {name for name, _ in page.attributes}
  assert not names & {"src", "href", "onload", "onerror", "action", "srcset"}
  assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", raw)
  assert set(re.findall(r"\w+://[\w./]+", raw)) == {"http://www.w3.org/2000/svg"}  # a name
  whole = "\n".join(page.texts)
  assert whole.count("alert('a & b')") == 2 + 1 + 1 + 4, "titles, sample, source, two keys twice"
  shown = ("finished", "34,567", "1.625", "gzip 2.125, xz 1.875", "123,456", "tokenizer.exact")
  assert all(text in whole for text in shown)
  # The keys that differ from the defaults come first, beside these.
  changed = whole[whole.index("keys changed") : whole.index("all ")].split()
  assert changed[changed.index("model.width") :][1:3] == ["32", "256"]
  assert "optim.kind" not in changed and "optim.kind" in whole
  # Seconds: 30 of steps, 15 of data, 5 of an evaluation.
  spent = whole[whole.index("What the time went into") :].split("\n")
  assert [spent[spent.index(k) + 1] for k in ("steps", "data", "evaluation")] == [
    "30.0 s", "15.0 s", "5.0 s"
  ]
  drawn = {chart["title"]: chart for chart in json.loads(page.scripts[0])}
  loss = drawn["loss, nats per token"]
  points = {line["name"]: line["points"] for line in loss["lines"]}
  steps = [line for line in lines if "loss" in line]
  for (step, value), line in zip(points["each step"], steps, strict=True):
    assert (step, value) == (line["step"], pytest.approx(line["loss"], rel=1e-5)), "in 6 digits"
  assert loss["range"] == [pytest.approx(9 / 60), 9]
  assert points["held out"] == [[30, 3.25], [60, 2.5]]
  # A bit of the gzip file is as much as 4 bytes a token x 2.125 bits in nats.
  assert [level for _, level in loss["levels"]] == [
    pytest.approx(bits * 4 * math.log(2)) for bits in (2.125, 1.875)
  ]
  assert drawn["new metric"]["lines"][0]["points"][-1] == [60, 420]
  assert {"</script>", "learning rate", "gradient norm", "tokens per second"} < drawn.keys()
  assert not any("moe" in title or title.endswith(" s") for title in drawn)


def test_a_run_that_goes_on_shows_no_older_result(tmp_path):
  _write(tmp_path / "run", steps=70)
  whole = "\n".join(_read(write_page(tmp_path / "run", tiny("x", steps=90))).texts)
  assert "step 70 of 90" in whole and "1.625" not in whole and "Samples" not in whole
  with pytest.raises(UserError, match=r"there is no step in '.*metrics.jsonl', so no run to show"):
    write_page(tmp_path)
  with pytest.raises(UserError, match=r"workdir '.*none' does not exist"):
    write_page(tmp_path / "none")


def test_long_runs_are_thinned_and_keep_their_spikes():
  lines = [{"step": step, "loss": 1.0} for step in range(1, 5001)]
  lines[1234]["loss"] = 50.0
  lines[4000]["loss"] = None
  chart = charts(lines, {})[0]
  each, mean = chart["lines"]
  # One value far from all others is named, and does not press them into a line.
  assert (chart["range"], chart["outside"]) == ([1, 1], 50)
  assert len(each["points"]) <= 800 and len(mean["points"]) <= 800
  assert max(high for *_, high in each["points"]) == 50
  assert min(low for _, _, low, _ in each["points"]) == 1
  average = sum(value for _, value, *_ in each["points"]) / len(each["points"])
  assert average == pytest.approx(1 + 49 / 5000, abs=1e-3)
  usual = charts([{"step": n, "loss": 4 + 5 / n} for n in range(1, 201)], {})[0]
  assert (usual["range"], usual["outside"]) == ([4.025, 9], None), "a curve is shown whole"
  few = charts(lines[3990:4010], {})[0]["lines"][0]["points"]
  assert few[10] == [4001, None], "a value that is not finite is a gap"
