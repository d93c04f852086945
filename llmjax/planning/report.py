"""Plans and searches as lines of text, and a search as a plot of step time against memory."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

_GIB = 2**30
_MOST = 4  # arrays and collectives shown, of a kind
_BOUNDS = ("compute", "hbm", "ici", "dcn")
_KINDS = ("arguments", "temporaries", "outputs", "aliased", "code")


def show(plan: dict) -> str:
  """Formats what `plan` returns."""
  mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1"
  slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
  lines = [
    f"{slices}{plan['topology']}, {plan['chips']:,} chips, mesh {mesh}; "
    f"{plan['parameters']:,} parameters, {plan['tokens_per_step']:,} tokens a step"
  ]
  if "compiler" in plan:
    lines.append(f"the compiler was not asked: {plan['compiler']}")
  if "prefill" in plan:
    lines += ["prompts:", *_program(plan["prefill"], plan["hbm_bytes"])]
    lines += [f"one token of every row, cache {_gib(plan['cache_bytes'])} in all:"]
  lines += _program(plan, plan["hbm_bytes"])
  lines.append(_money(plan))
  return "\n".join(lines)


def _program(said: dict, hbm_bytes: float) -> list[str]:
  """What is known of one program."""
  lines = _memory(said, hbm_bytes) if "fits" in said else []
  if "collectives" in said:
    lines.append(f"sends: {_sent(said['collectives'])}")
  elif "sends_by_formula" in said:
    lines.append(f"sends by formula: {_sent(said['sends_by_formula'])}")
  if "est_step_s" in said:
    count = said["estimate"]
    lines += [
      f"takes {said['est_step_s']:.4g} s by the compiler's estimate, {said['mfu']:.1%} MFU implied",
      f"  fusions {count['fusions_s']:.4g} s, kernels {count['kernels_s']:.4g} s (at peak), waits "
      f"for links {count['exposed_s']:.4g} s; {count['flops']:.3g} FLOPs a device",
    ]
  ideal = f"at best {said['ideal_step_s']:.4g} s by formula"
  if "roofline" in said:
    bounds = (f"{name} {said['roofline'][f'{name}_s']:.4g}" for name in _BOUNDS)
    ideal += f", bound by {said['bound']}: {', '.join(bounds)}; {said['ideal_mfu']:.1%} MFU "
    ideal += f"of {said['model_flops_per_step']:.3g} FLOPs"
  lines.append(ideal)
  if "compile_s" in said:
    before = " (before; kept since)" if said["cached"] else ""
    lines.append(f"compiled in {said['compile_s']:.1f} s{before}")
  return [f"  {line}" for line in lines]


def _memory(said: dict, hbm_bytes: float) -> list[str]:
  if "compile_s" not in said:
    word = "fits" if said["fits"] else "does not fit"
    return [f"{word} by formula: {_gib(said['peak_bytes'])} of {_gib(hbm_bytes)} of a device"]
  if not said["fits"]:
    lines = [
      f"does not fit: it wants {_gib(said['peak_bytes'])} of a device that has "
      f"{_gib(said['usable_bytes'])}"
    ]
    if held := Counter(said.get("memory_by_formula")).most_common(_MOST):
      lines.append("  by formula " + ", ".join(f"{kind} {_gib(size)}" for kind, size in held))
    lines += [f"  change {change}" for change in said["change"]]
  else:
    kinds = ", ".join(f"{kind} {_gib(said['memory'][kind])}" for kind in _KINDS)
    lines = [f"fits: {_gib(said['peak_bytes'])} of {_gib(hbm_bytes)} of a device ({kinds})"]
  arrays = said["largest_buffers"]
  made = [one for one in arrays if one["source"]][:_MOST]
  given = [one for one in arrays if not one["source"]][:_MOST]
  for one in sorted(made + given, key=lambda one: -one["bytes"]):
    what = one["operation"].rpartition(")/")[2]
    lines.append(f"  {_gib(one['bytes'])} {one['shape']} {what} {_near(one['source'])}".rstrip())
  return lines


def _sent(collectives: list[dict]) -> str:
  """Bytes by kind and axis, most first."""
  total, count = Counter(), Counter()
  for one in collectives:
    key = one["kind"], one["axis"]
    total[key] += one["bytes"] * one.get("count", 1)
    count[key] += one.get("count", 0)
  parts = [
    f"{kind} {axis} {_gib(size)}" + (f" in {count[kind, axis]:,}" if count[kind, axis] else "")
    for (kind, axis), size in total.most_common(_MOST)
  ]
  return ", ".join(parts) or "nothing"


def _money(plan: dict) -> str:
  rate = "by the compiler's estimate" if "est_step_s" in plan else "at best"
  text = f"{plan['tokens_per_day']:,.0f} tokens a day {rate}"
  if "run_days" in plan:
    text += f", the whole run in {plan['run_days']:,.3g} days"
  if not plan["cost_usd_per_btokens"]:
    return f"{text}; no price is known, see --price"
  dollars = f"{plan['cost_usd_per_btokens']:,.2f} dollars a billion tokens"
  if "prefill" in plan:
    dollars = f"{plan['cost_usd_per_mtokens']:,.4g} dollars a million tokens written"
  text += f"; {dollars} at {plan['usd_per_chip_hour']:.2f} a chip and hour"
  return text + (f", {plan['run_cost_usd']:,.0f} in all" if "run_days" in plan else "")


def _gib(size: float) -> str:
  for unit, name in ((_GIB, "GiB"), (2**20, "MiB")):
    if size >= unit:
      return f"{size / unit:,.2f} {name}"
  return f"{size / 2**10:,.1f} KiB"


def _near(source: str) -> str:
  """A path as seen from here, if it is below."""
  near = os.path.relpath(source) if source else ""
  return source if near.startswith("..") else near


def says(best: dict, limits, unpriced: set) -> str:
  """The answer in one line, for the row that stands first."""
  name = _where(best) + ", " + _knobs(best)
  have, want = best["hbm_bytes"] / _GIB, best["peak_bytes"] / _GIB
  more = [f"{chip} has no list price: --price=DOLLARS" for chip in sorted(unpriced)]
  if "compiler" in best:
    more.append(f"the compiler: {best['compiler']}")
  free = "".join(f"; {text}" for text in more)
  if "error" in best:
    return f"the compiler refused all that were tried, the best of them with: {best['error']}{free}"
  if not best["fits"]:
    return (
      f"nothing fits: the closest, {name}, wants {want:.1f} GiB of {have:.1f}, which lacks "
      f"{want - have:.1f} GiB a device; more chips or a smaller data.batch_size"
    )
  bill = _bill(best) if limits.tokens else ""
  if not best["within"]:
    wanted = [f"${limits.budget_usd:,.0f}"] * (limits.budget_usd > 0)
    wanted += [f"{limits.max_days:g} days"] * (limits.max_days > 0)
    return f"nothing is within {' and '.join(wanted)}: the nearest, {name}, takes {bill}{free}"
  by = "the compiler's estimate" if best["by"] == "compiler" else "formula"
  return f"{name}: {best['step_s']:.3g} s a step by {by}" + (f"; {bill}" if bill else "") + free


def _where(row: dict) -> str:
  return row["topology"] + (f" × {row['slices']} slices" if row["slices"] > 1 else "")


def _knobs(row: dict) -> str:
  """Mesh and what else was changed, in few words."""
  mesh = " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device"
  rest = [
    f"{key.rpartition('.')[2]}={value}"
    for key, value in row["changes"].items() if not key.startswith("mesh.") or key == "mesh.across"
  ]
  return ", ".join([mesh, *rest])


def _bill(row: dict) -> str:
  usd = "no price known" if row["cost_usd"] is None else f"${row['cost_usd']:,.2f}"
  return f"{row['days']:.3g} days, {usd}"


def show_row(row: dict) -> str:
  """Formats a row, one line."""
  if "error" in row:
    return f"{_where(row)} {_knobs(row)}: {row['error']}"
  flaw = "" if row["fits"] else "  does not fit"
  flaw += "" if row["within"] else "  not within limits"
  return (
    f"{row['step_s']:9.4f} s {row['mfu']:6.1%} {row['peak_bytes'] / _GIB:6.2f} GiB  {row['by']:8}  "
    f"{_where(row)}  {_knobs(row)}{'  ' + _bill(row) if row['days'] else ''}{flaw}"
  )


def show_search(result: dict, most: int = 20) -> str:
  """Formats a search: the best rows, then the answer."""
  head = f"{'step':>11} {'mfu':>6} {'peak':>10}  by        where, mesh and what is changed"
  lines = [head, *map(show_row, result["rows"][:most]), result["says"]]
  if result["winner"]:
    changes = result["winner"]["changes"].items()
    lines.append("".join(f" --config.{key}={value}" for key, value in changes)[1:] or "as it is")
  return "\n".join(lines)


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
