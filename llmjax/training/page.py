"""`report.html`, the page of a run: one file that a browser opens without a network. `page.html` is
its template; everything that is put in is escaped."""

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import numpy as np

from llmjax.core import files
from llmjax.core.config import with_new_names
from llmjax.core.errors import UserError
from llmjax.training.config import Config
from llmjax.training.metrics import BESIDE, read_metrics
from llmjax.training.plot import levels
from llmjax.training.stored import newest_meta

NAME = "report.html"
_POINTS = 800  # of a line, at most: about as many as a chart has pixels
_CHARTS = {
  "loss": "loss, nats per token", "learning_rate": "learning rate", "grad_norm": "gradient norm",
  "tokens_per_s": "tokens per second", "mfu": "model FLOPs utilization, fraction of peak",
  "matmul_share": "model FLOPs, fraction of the measured matmul peak",
}


def write_page(workdir: str | Path, config: Config | None = None) -> Path:
  """Writes `report.html` of a run, finished or not, from the files in its workdir.

  Args:
    config: of the run; by default that of its newest checkpoint.
  Returns:
    The path of the page.
  Raises:
    UserError: there are no metrics in the workdir.
  """
  workdir = Path(workdir)
  files.check_exists("workdir", workdir, "folder")
  lines = read_metrics(workdir)
  steps = [line for line in lines if "loss" in line]
  if not steps:
    raise UserError(f"there is no step in {str(workdir / 'metrics.jsonl')!r}, so no run to show")
  last = steps[-1]["step"]
  result = files.read_json(workdir / "result.json", default={})
  result = result if result.get("steps") == last else {}  # else: of before the run went on
  values = dataclasses.asdict(config) if config else (newest_meta(workdir) or {}).get("config", {})
  values = _flat(with_new_names(json.loads(json.dumps(values))))
  total = values.get("train.steps", last)
  status = f"{last:,} steps, finished" if result else f"step {last:,} of {total:,}"
  samples = workdir / "samples.txt"
  wide = [_config(values)]
  if result and samples.is_file():
    wide.insert(0, _card("Samples", f"<pre>{_text(samples.read_text())}</pre>", "wide"))
  if result:
    wide.append(_card("Result", _table(("field", "value"), _flat(result).items()), "wide"))
  data = json.dumps(charts(lines, result)).replace("<", "\\u003c")
  cards = [_times(lines), _data(workdir, result)]
  parts = {
    "title": _text(workdir.absolute().name), "status": _text(status), "data": data,
    "tiles": _tiles(result, steps), "cards": "".join(cards), "wide": "".join(wide),
  }
  template = Path(__file__).with_suffix(".html").read_text()
  page = re.sub("@@([a-z]+)@@", lambda match: parts[match[1]], template)
  files.replace(workdir / NAME, page)
  return workdir / NAME


def charts(lines: list[dict], result: dict) -> list[dict]:
  """Makes the charts of a run: those that every run has, then one for each further number.

  Args:
    lines: `metrics.jsonl`.
    result: `result.json`, or {}.
  Returns:
    For each its `title`, `levels` as [name, value], the `range` of values to show, the largest
    value `outside` of it or None, and `lines`: name and points [step, value], of long runs [step,
    mean, least, largest].
  """
  steps = [line for line in lines if "loss" in line]
  numbers = {k: 0 for line in steps for k, v in line.items() if not isinstance(v, list)}
  names = [name for name in _CHARTS if name in numbers]
  names += [n for n in numbers if n not in _CHARTS and n != "step" and not n.endswith("_s")]
  out = []
  for name in names:
    shown = [(line["step"], line[name]) for line in steps if name in line]
    drawn = [{"name": "each step", "hue": 0, "points": _thinned(shown)}]
    width = len(shown) // 50
    if width > 1 and name != "learning_rate":
      drawn[0]["faint"] = True
      means = _thinned(_running_mean(shown, width))
      drawn.append({"name": f"mean of {width}", "hue": 0, "points": means})
    held_out = [(m["step"], m["nats_per_token"]) for m in lines if "nats_per_token" in m]
    if name == "loss" and result:
      held_out.append((result["steps"], result["nats_per_token"]))
    if name == "loss" and held_out:
      drawn.append({"name": "held out", "hue": 1, "points": held_out, "dots": True})
    marks = list(levels(result).items())[:-1] if name == "loss" else []  # the model has its dot
    title = _CHARTS.get(name, name.replace("_", " "))
    always = [value for _, value in [*held_out * (name == "loss"), *marks]]
    low, high, outside = _range([value for _, value in shown], always)
    chart = {"title": title, "lines": drawn, "levels": marks, "range": [low, high]}
    out.append(chart | {"outside": outside})
  return out


def _range(values, always) -> tuple[float, float, float | None]:
  """The least and largest value to show; the largest of all where it is far outside of 99 %."""
  known, always = (
    np.array([v for v in some if files.finite(v) is not None]) for some in (values, always)
  )
  if not len(known):
    return 0.0, 1.0, None
  low, high = np.percentile(known, [1, 99])
  room = 3 * (high - low)
  shown = [max(known.min(), low - room), min(known.max(), high + room), *always]
  outside = float(known.max()) if known.max() > max(shown) else None
  return float(min(shown)), float(max(shown)), outside


def _running_mean(points, width: int):
  steps, values = np.array(points, float).T
  means = np.convolve(values, np.ones(width) / width, mode="valid")
  return list(zip(steps[width - 1 :].tolist(), means.tolist(), strict=True))


def _thinned(points) -> list[list]:
  """At most `_POINTS` points."""
  size = -(-len(points) // _POINTS)
  if size < 2:
    return [[int(step), _digits(value)] for step, value in points]
  out = []
  for start in range(0, len(points), size):
    some = points[start : start + size]
    values = [value for _, value in some if files.finite(value) is not None]
    numbers = (sum(values) / len(values), min(values), max(values)) if values else [None] * 3
    out.append([int(some[len(some) // 2][0]), *map(_digits, numbers)])
  return out


def _digits(value):
  """A number in as many digits as a reader of a chart can see; NaN and infinities as None."""
  return None if files.finite(value) is None else float(f"{value:.6g}")


def _text(value) -> str:
  return html.escape(str(value))


def _number(value) -> str:
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
  return f"{value:,}" if type(value) is int else str(value)


def _card(title: str, inner: str, kind: str = "") -> str:
  return f'<div class="card {kind}"><h2>{_text(title)}</h2>{inner}</div>'


def _table(heads, rows) -> str:
  """A table; numbers stand to the right."""

  def cell(tag, value, right):
    text = value if isinstance(value, str) else _number(value)
    return f"<{tag}{' class=n' if right else ''}>{_text(text)}</{tag}>"

  rows = [tuple(row) for row in rows]
  right = [
    any(type(v) in (int, float) for v in column) for column in zip(*rows, strict=True)
  ] or [False] * len(heads)
  line = lambda tag, row: f"<tr>{''.join(map(cell, [tag] * len(row), row, right))}</tr>"  # noqa: E731
  body = "".join(line("td", row) for row in rows)
  return (
    f'<div class="scroll"><table><thead>{line("th", heads)}</thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _tiles(result: dict, steps: list[dict]) -> str:
  peers = [f"{name} {result.get(f'{name}_bits_per_byte', math.nan):.3f}" for name in ("gzip", "xz")]
  names = {
    "bits_per_byte": f"held-out bits per byte ({', '.join(peers)})",
    "nats_per_token": "held-out nats per token", "parameters": "parameters",
    "train_seconds": "seconds of training", "tokens_per_s": "tokens per second",
  }
  shown = [(text, result[name]) for name, text in names.items() if result.get(name) is not None]
  shown.append(("training loss of the last step, nats per token", steps[-1]["loss"]))
  return "".join(
    f'<div class="card"><b>{_text(_number(value))}</b>'
    f'<span class="faint">{_text(text)}</span></div>'
    for text, value in shown
  )


def _times(lines: list[dict]) -> str:
  names = {"steps": "steps", **BESIDE}
  spent = [
    (text, sum(line.get(f"{name}_s") or 0.0 for line in lines)) for name, text in names.items()
  ]
  whole = sum(seconds for _, seconds in spent) or 1.0
  bar = "".join(
    f'<span title="{text}" style="width: {s / whole:.2%}; background: var(--c{i})"></span>'
    for i, (text, s) in enumerate(spent)
  )
  keys = "".join(
    f'<tr><td><i style="background: var(--c{i})"></i>{text}</td><td class="n">{s:,.1f} s</td>'
    f'<td class="n">{s / whole:.1%}</td></tr>'
    for i, (text, s) in enumerate(spent)
  )
  return _card(
    "What the time went into", f'<div class="bar">{bar}</div><table class="keys">{keys}</table>'
  )


def _data(workdir: Path, result: dict) -> str:
  table = files.read_json(workdir / "data.json", list, default=[])
  if table:
    heads = ("text", "source", "documents", "tokens", "bytes")
    return _card("Data", _table(heads, ([row.get(h, "") for h in heads] for row in table)))
  known = {k: result[k] for k in ("bytes", "tokens") if k in result}
  return _card("Data: held-out text", _table(("", "number"), known.items())) if known else ""


def _config(values: dict) -> str:
  default = _flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
  show = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
  rows = [(key, show(value), show(default.get(key, ""))) for key, value in values.items()]
  heads = ("key", "value", "default")
  changed = [row for row in rows if row[1] != row[2]]
  return _card(
    f"Config: {len(changed)} keys changed",
    f"{_table(heads, changed)}<details><summary>all {len(rows)} keys</summary>"
    f"{_table(heads, rows)}</details>",
    "wide",
  )


def _flat(values: dict, prefix: str = "") -> dict:
  out = {}
  for key, value in values.items():
    inner = isinstance(value, dict)
    out |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
  return out
