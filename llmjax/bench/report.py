"""From rounds to figures: medians, spreads, ratios, a table, and the machine they are of."""

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

_PACKAGES = (
  "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "litgpt", "llama-cpp-python",
)


def summary(rounds: Sequence[dict]) -> dict:
  """Sums up one peer's rounds.

  Args:
    rounds: answers, in order, all with the same keys; numbers are summed up.
  Returns:
    The median of each number; for `tokens_per_s` also `least_per_s` and `most_per_s`; for
    `peak_bytes` the largest.
  """
  values = {
    key: [answer[key] for answer in rounds]
    for key, value in rounds[0].items() if isinstance(value, int | float)
  }
  row = {key: statistics.median(numbers) for key, numbers in values.items()}
  if rates := values.get("tokens_per_s"):
    row |= {"least_per_s": min(rates), "most_per_s": max(rates)}
  return row | {key: max(values[key]) for key in ("peak_bytes",) if key in values}


def compare(rounds: Mapping[str, Sequence[dict]], base: str) -> list[dict]:
  """Turns the peers' answers into one row a peer, in order.

  Returns:
    `peer`, what `summary` says, and where the base was measured `ratio` = base ÷ peer, the median
    over rounds, which ran side by side; `decode_ratio` where there are decoding rates.
  """
  rows = []
  for name, answers in rounds.items():
    row = {"peer": name, **summary(answers)}
    pairs = list(zip(rounds[base], answers, strict=True)) if base in rounds else ()
    for ratio, key in (("ratio", "tokens_per_s"), ("decode_ratio", "decode_tokens_per_s")):
      if pairs and key in pairs[0][0] and key in pairs[0][1]:
        row[ratio] = statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
    rows.append(row)
  return rows


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
  """Lays rows out under their columns: the first to the left, numbers to the right."""
  shown = [list(columns), *([_cell(value) for value in row] for row in rows)]
  widths = [max(len(row[i]) for row in shown) for i in range(len(columns))]
  lines = []
  for row in shown:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def _cell(value) -> str:
  if value is None or isinstance(value, str):
    return value or "–"
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def machine() -> dict:
  """Describes where figures come from: processor, cores, load before, versions."""
  info = Path("/proc/cpuinfo")
  models = re.findall(r"^model name\s*: *(.*)", info.read_text() if info.exists() else "", re.M)
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    "cpu": models[0] if models else platform.processor(),
    "cores": cores(),
    "system": platform.platform(),
    "python": platform.python_version(),
    "load_before": os.getloadavg()[0],
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "versions": versions,
  }


def cores() -> int:
  """Counts the cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
