"""The picture of a search: seconds of a step against memory of a device."""

from collections.abc import Iterator, Sequence
from pathlib import Path

_GIB = 2**30


def pareto(rows: Sequence[dict]) -> Iterator[dict]:
  """Yields the rows than which none is both faster and smaller, fastest first.

  Args:
    rows: of a search, of one topology; those without `step_s` are passed over.
  """
  least = float("inf")
  for row in sorted(
    (row for row in rows if "step_s" in row), key=lambda row: (row["step_s"], row["peak_bytes"])
  ):
    if row["peak_bytes"] < least:
      least = row["peak_bytes"]
      yield row


def plot_pareto(result: dict, path: Path):
  """Draws a search's rows: small by formula, large by the compiler, with each front and limit.

  Args:
    result: what `search` returned.
    path: PNG to write.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), dpi=120, layout="tight")
  axes = figure.subplots()
  groups = {}
  for row in result["rows"]:
    if "step_s" in row:
      groups.setdefault((row["topology"], row["slices"], row["by"]), []).append(row)
  places = list(dict.fromkeys(key[:2] for key in groups))
  for (*place, by), rows in groups.items():
    color, told = f"C{places.index(tuple(place))}", by == "compiler"
    front = [(row["peak_bytes"] / _GIB, row["step_s"]) for row in pareto(rows)]
    points = [(row["peak_bytes"] / _GIB, row["step_s"]) for row in rows]
    name = place[0] + (f" × {place[1]}" if place[1] > 1 else "")
    axes.scatter(
      *zip(*points, strict=True), s=40 if told else 10, alpha=1 if told else 0.5, color=color,
      label=f"{name}, {'the compiler' if told else 'formula'}",
    )
    axes.plot(*zip(*front, strict=True), color=color, lw=1.5 if told else 0.8)
    axes.axvline(rows[0]["hbm_bytes"] / _GIB, color=color, ls="--", lw=0.8)
  axes.set(xlabel="peak memory of a device, GiB (dashed: what it has)", ylabel="step, s, estimated")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path)
