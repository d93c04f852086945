"""Plans and searches as lines of text."""

import os
from collections import Counter

from llmjax.parallel.collectives import Collective, describe, show_bytes

_GIB = 2**30
_MOST = 4  # arrays and collectives shown, of a kind
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
    lines += [f"one token of every row, cache {show_bytes(plan['cache_bytes'])} in all:"]
  lines += _program(plan, plan["hbm_bytes"])
  lines.append(_money(plan))
  return "\n".join(lines)


def _program(answer: dict, hbm_bytes: float) -> list[str]:
  """What is known of one program."""
  lines = _memory(answer, hbm_bytes) if "fits" in answer else []
  if "collectives" in answer:
    lines.append(f"sends: {_sends(answer['collectives'])}")
  elif sends := answer.get("sends_by_formula"):
    lines.append(f"sends by formula: {_sends(sends)}")
  if "est_step_s" in answer:
    time = answer["estimate"]
    lines += [
      f"takes {answer['est_step_s']:.4g} s by the compiler's estimate, {answer['mfu']:.1%} MFU",
      f"  fusions {time['fusions_s']:.4g} s, kernels {time['kernels_s']:.4g} s (at peak), waits "
      f"for links {time['exposed_s']:.4g} s",
    ]
  if "predicted_s" in answer:
    seconds, mfu = answer["predicted_s"], answer["predicted_mfu"]
    lines.append(f"takes {seconds:.4g} s by formula, {mfu:.1%} MFU")
  roofline = f"roofline: at least {answer['ideal_step_s']:.4g} s"
  if "roofline" in answer:
    bounds = (f"{key[:-2]} {seconds:.4g}" for key, seconds in answer["roofline"].items())
    roofline += f", bound by {answer['bound']}: {', '.join(bounds)}; at most "
    roofline += f"{answer['ideal_mfu']:.1%} MFU of {answer['model_flops_per_step']:.3g} FLOPs"
  lines.append(roofline)
  if "compile_s" in answer:
    before = " (cached)" if answer["cached"] else ""
    lines.append(f"compiled in {answer['compile_s']:.1f} s{before}")
  return [f"  {line}" for line in lines]


def _memory(answer: dict, hbm_bytes: float) -> list[str]:
  peak, of = show_bytes(answer["peak_bytes"]), f"{show_bytes(hbm_bytes)} of a device"
  if "compile_s" not in answer:
    return [f"{'fits' if answer['fits'] else 'does not fit'} by formula: {peak} of {of}"]
  if answer["fits"]:
    kinds = ", ".join(f"{kind} {show_bytes(answer['memory'][kind])}" for kind in _KINDS)
    lines = [f"fits: {peak} of {of} ({kinds})"]
  else:
    usable = show_bytes(answer["usable_bytes"])
    lines = [f"does not fit: it wants {peak} of a device that has {usable}"]
    if held := Counter(answer.get("memory_by_formula")).most_common(_MOST):
      lines.append("  by formula " + ", ".join(f"{kind} {show_bytes(size)}" for kind, size in held))
    lines += [f"  change {change}" for change in answer["change"]]
  arrays = sorted(answer["largest_buffers"], key=lambda array: -array["bytes"])
  computed = [array for array in arrays if array["source"]][:_MOST]
  arguments = [array for array in arrays if not array["source"]][:_MOST]
  for array in arrays:
    if array in computed or array in arguments:
      source = os.path.relpath(array["source"]) if array["source"] else ""
      source = array["source"] if source.startswith("..") else source
      what = array["operation"].rpartition(")/")[2]
      lines.append(f"  {show_bytes(array['bytes'])} {array['shape']} {what} {source}".rstrip())
  return lines


def _sends(collectives: list[dict]) -> str:
  return describe([
    Collective(each["kind"], (each["axis"],), each["bytes"], each.get("count", 1))
    for each in collectives
  ])


def _money(plan: dict) -> str:
  by = "by the compiler's estimate" if "est_step_s" in plan else "by formula"
  text = f"{plan['tokens_per_day']:,.0f} tokens a day {by if 'predicted_s' in plan else 'at most'}"
  if "run_days" in plan:
    text += f", the whole run in {plan['run_days']:,.3g} days"
  usd = plan["cost_usd_per_btokens"]
  if not usd:
    return f"{text}; no price is known, see --price"
  dollars = f"{usd:,.2f} dollars a billion tokens"
  if "prefill" in plan:
    dollars = f"{usd / 1000:,.4g} dollars a million tokens written"
  text += f"; {dollars} at {plan['usd_per_chip_hour']:.2f} a chip and hour"
  return text + (f", {plan['run_cost_usd']:,.0f} in all" if "run_days" in plan else "")


def verdict(best: dict, unpriced: list[str]) -> str:
  """The answer of a search in one line, for the row that stands first."""
  name = f"{_where(best)}, {_settings(best)}"
  have, want = best["hbm_bytes"] / _GIB, best["peak_bytes"] / _GIB
  notes = [f"{chip} has no list price: --price=DOLLARS" for chip in unpriced]
  if "compiler" in best:
    notes.append(f"the compiler: {best['compiler']}")
  notes = "".join(f"; {text}" for text in notes)
  if "error" in best:
    return f"the compiler refused all that were tried, the best with: {best['error']}{notes}"
  if not best["fits"]:
    return (
      f"nothing fits: the closest, {name}, wants {want:.1f} GiB of {have:.1f}, which lacks "
      f"{want - have:.1f} GiB a device; more chips or a smaller data.batch_size"
    )
  by = "the compiler's estimate" if best["by"] == "compiler" else "formula"
  return f"{name}: {best['step_s']:.4g} s a step by {by}{_bill('; ', best)}{notes}"


def _where(row: dict) -> str:
  return row["topology"] + (f" × {row['slices']} slices" if row["slices"] > 1 else "")


def _settings(row: dict) -> str:
  """Mesh and what else was changed, in few words."""
  mesh = " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device"
  rest = [
    f"{key.rpartition('.')[2]}={value}"
    for key, value in row["changes"].items() if not key.startswith("mesh.") or key == "mesh.across"
  ]
  return ", ".join([mesh, *rest])


def _bill(before: str, row: dict) -> str:
  usd = "no price known" if row["cost_usd"] is None else f"${row['cost_usd']:,.2f}"
  return f"{before}{row['days']:.3g} days, {usd}" if row["days"] else ""


def show_row(row: dict) -> str:
  """Formats a row of a search, one line."""
  if "error" in row:
    return f"{_where(row)} {_settings(row)}: {row['error']}"
  return (
    f"{row['step_s']:9.4f} s {row['mfu']:6.1%} {row['peak_bytes'] / _GIB:6.2f} GiB  {row['by']:8}  "
    f"{_where(row)}  {_settings(row)}{_bill('  ', row)}{'' if row['fits'] else '  does not fit'}"
  )


def show_search(result: dict, most: int = 20) -> str:
  """Formats a search: the best rows, then the answer."""
  head = f"{'step':>11} {'mfu':>6} {'peak':>10}  by        where, mesh and what is changed"
  lines = [head, *map(show_row, result["rows"][:most]), result["says"]]
  if result["winner"]:
    changes = result["winner"]["changes"].items()
    flags = "".join(f" --config.{key}={value}" for key, value in changes)[1:]
    lines.append(flags or "the config is already the best")
  return "\n".join(lines)
