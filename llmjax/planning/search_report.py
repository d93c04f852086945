"""What a search found, as lines for people."""

from llmjax.planning.limits import Limits

_GIB = 2**30


def says(best: dict, limits: Limits, unpriced: set) -> str:
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


def show(result: dict, most: int = 20) -> str:
  """Formats a search: the best rows, then the answer."""
  head = f"{'step':>11} {'mfu':>6} {'peak':>10}  by        where, mesh and what is changed"
  lines = [head, *map(show_row, result["rows"][:most]), result["says"]]
  if result["winner"]:
    changes = result["winner"]["changes"].items()
    lines.append("".join(f" --config.{key}={value}" for key, value in changes)[1:] or "as it is")
  return "\n".join(lines)
