"""A plan as lines for people."""

import os
from collections import Counter

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
    count = said["recount"]
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
