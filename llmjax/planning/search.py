"""`plan --search`: which mesh and knobs, on which slice, by formula first and the compiler then.

Formulas put thousands of candidates in order in seconds; the compiler has the last word on the few
that they like best. Neither is a measurement.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from llmjax.core.chips import Topology
from llmjax.core.config import flat
from llmjax.core.errors import UserError
from llmjax.planning.candidates import (
  Candidate,
  Estimate,
  candidates,
  estimate,
  refined,
  with_vmem,
)
from llmjax.planning.cost import memory
from llmjax.planning.formulas import DAY_S, rent_usd
from llmjax.planning.plan import above_zero, plan
from llmjax.planning.report import pareto, says, show_row
from llmjax.training.config import Config
from llmjax.training.runnable import check_config

_FAR = 1.5  # times the best candidate's seconds; slower ones are not looked at
_NEAR = 1.15  # times a device's memory, by formula, is still shown to the compiler
_REFINED = 4  # meshes whose best candidates are varied further,
_FULL = (1.0, 0.9)  # to fill these shares of a device's memory, as formulas err to both sides
_SHOWN = 20  # rows by formula alone, of each topology, beside those of the Pareto front


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a run may take; 0 leaves each open.

  Attributes:
    tokens: of the whole run.
    budget_usd: for them.
    max_days: for them.
    usd_per_hour: of a chip, instead of the list price.
  """

  tokens: float = 0.0
  budget_usd: float = 0.0
  max_days: float = 0.0
  usd_per_hour: float = 0.0

  def __post_init__(self):
    for name, value in vars(self).items():
      above_zero(name, value or None)
    if not self.tokens and (self.budget_usd or self.max_days):
      raise UserError("--budget and --max-days need --tokens, such as --tokens=20B")


def search(
  config: Config,
  places: Sequence[Topology],
  limits: Limits | None = None,
  keep: int = 8,
  jobs: int = 0,
  compile: Callable[[Config, str, int], dict] = plan,
  report: Callable[[str], None] | None = None,
) -> dict:
  """Finds the best way to run an experiment, and where.

  The global batch stays the config's. Rows are ordered by seconds of a step; with several
  topologies by dollars of a token, or, where a budget alone is set, by days.

  Args:
    config: the experiment; its own mesh, ZeRO stage, accumulation, remat, attention block and
      pipeline are what is searched.
    places: topologies to choose from.
    limits: tokens, dollars and days.
    keep: how many are compiled, over all topologies at least one each; 0 compiles none. The best
      of each topology is compiled again with other amounts of fast memory.
    jobs: compiler processes at once; 0 means as many as there are cores.
    compile: `plan`, or what answers like it.
    report: called with two lines for every topology and one for every compiled candidate.
  Returns:
    `rows`, best first; `winner`, the first if it fits and is within limits, else None; `fits`;
    `says`, the answer in one line; `considered`, how many had their seconds estimated; `unpriced`,
    chips without a price. A row: `topology`, `slices`, `mesh`, `changes` by dotted key, `step_s`,
    `by` (compiler or formula), `predicted_s`, `mfu`, `peak_bytes`, `hbm_bytes`, `fits`, `days`,
    `cost_usd` and `usd_per_btokens` (None without a price), `within` limits, `outdone` (by formula,
    where the compiler found one that fits); and `error` of one that the compiler refused.
  Raises:
    UserError: no mesh of any topology divides the model and its rows.
  """
  limits, report = limits or Limits(), report or (lambda line: None)
  filled, rows, considered = check_config(config), [], 0
  for place in places:
    report(f"{place.name}: estimating meshes and knobs by formula")
    pool, count = _pool(filled, place, flat(config), limits)
    considered += count
    fit = sum(row["fits"] for _, row in pool)
    report(f"{place.name}: {count:,} candidates; {fit:,} fit and are near the best of these")
    rows += _compiled(pool, keep and max(1, keep // len(places)), jobs, compile, report, limits)
  if not rows:
    names = ", ".join(place.name for place in places)
    raise UserError(f"no mesh of {names} divides this model and {config.data.batch_size} rows")
  hurry = limits.budget_usd and not limits.max_days
  rows.sort(key=lambda row: (*_flaws(row), *_merits(row, len(places) > 1, hurry)))
  winner = rows[0] if rows[0]["fits"] and rows[0]["within"] else None
  unpriced = {p.chip.name for p in places if not (limits.usd_per_hour or p.chip.usd_per_hour)}
  return {
    "winner": winner, "fits": rows[0]["fits"], "says": says(rows[0], limits, unpriced),
    "considered": considered, "unpriced": sorted(unpriced), "rows": rows,
  }


def _flaws(row: dict) -> tuple:
  """What puts a row behind others, worst first."""
  return "error" in row, not row["fits"], not row["within"], row["outdone"]


def _merits(row: dict, several: bool, hurry: bool) -> tuple:
  """What puts a row behind others of its kind: no price, dollars or, within a budget, days."""
  if not several:
    return (row["step_s"],)
  slow = row["days"] if hurry and row["within"] else row["usd_per_btokens"]
  return row["usd_per_btokens"] is None, slow or 0, row["step_s"]


def _pool(config: Config, place: Topology, base: dict, limits: Limits) -> tuple[list, int]:
  """Pairs (candidate, row) of those that fit by formula, fastest first; and how many there were.

  Walks in order of predicted seconds and stops where they are far above the first that fits, so
  the best by formula is always among them. If nothing fits: the one that wants least.
  """
  ranked = [(estimate(one), one) for one in candidates(config, place)]
  ranked.sort(key=lambda pair: pair[0].step_s)
  pool, least = [], None
  for said, one in ranked:
    if pool and said.step_s > _FAR * pool[0][1]["step_s"]:
      break
    row = _row(one, said, base, limits)
    if row["fits"]:
      pool.append((one, row))
    elif least is None or row["peak_bytes"] < least[1]["peak_bytes"]:
      least = one, row
  if not pool:
    return [least] if least else [], len(ranked)
  heads = _heads(pool)[:_REFINED]
  for one, _ in heads:
    finer = [(one, _row(one, estimate(one), base, limits)) for one in refined(one)]
    finer.sort(key=lambda pair: pair[1]["step_s"])
    for share in _FULL:
      near = [pair for pair in finer if pair[1]["peak_bytes"] <= share * pair[1]["hbm_bytes"]]
      have = [one.config for one, _ in pool]
      pool += [pair for pair in near[:1] if pair[0].config not in have]
  return sorted(pool, key=lambda pair: pair[1]["step_s"]), len(ranked)


def _heads(pool: list) -> list:
  """The fastest of each mesh, in order."""
  heads = {}
  for pair in pool:
    heads.setdefault(str(pair[1]["mesh"]), pair)
  return list(heads.values())


def _row(one: Candidate, said: Estimate, base: dict, limits: Limits) -> dict:
  """A candidate in numbers, by formula."""
  chip = one.chips.chip
  peak, hbm = memory(one.config, one.sizes, chip).peak, chip.hbm_bytes / chip.devices
  return {
    "topology": one.chips.name, "slices": one.chips.slices,
    "mesh": {axis: size for axis, size in one.sizes.items() if size > 1},
    "changes": {key: value for key, value in one.changes.items() if base[key] != value},
    "by": "formula", "predicted_s": said.step_s, "step_s": said.step_s, "mfu": said.mfu,
    "peak_bytes": peak, "hbm_bytes": hbm, "fits": peak <= hbm, "outdone": False,
    **_costs(one, said.step_s, limits),
  }


def _costs(one: Candidate, step_s: float, limits: Limits) -> dict:
  chips, tokens = one.chips, one.config.data.batch_size * one.config.model.max_seq_len
  price = limits.usd_per_hour or chips.chip.usd_per_hour
  days_per_token = step_s / tokens / DAY_S
  days = limits.tokens * days_per_token
  usd_per_day = rent_usd(chips.chip, chips.chips, 24, price) if price else None
  usd = usd_per_day and usd_per_day * days
  dear = limits.budget_usd > 0 and (usd is None or usd > limits.budget_usd)
  return {
    "days": days, "cost_usd": usd,
    "usd_per_btokens": usd_per_day and usd_per_day * days_per_token * 1e9,
    "within": not dear and not 0 < limits.max_days < days,
  }


def _compiled(pool, keep: int, jobs: int, compile, report, limits: Limits) -> list[dict]:
  """The rows of a pool, the best of them by the compiler's estimate.

  Where none of these fits, formulas' bytes are scaled by what the compiler wanted, and there is one
  more round. The last goes over what no formula knows, the fast memory of the best.
  """
  run = lambda pairs: _compile_all(pairs, jobs, compile, report, limits)  # noqa: E731
  near = [pair for pair in pool if pair[1]["peak_bytes"] <= _NEAR * pair[1]["hbm_bytes"]]
  tried = _beam(near, keep)
  told, rest = run(tried), [pair for pair in pool if pair not in tried]
  if tried and not any(row["fits"] for row in told):
    wanted = [
      new["peak_bytes"] / old["peak_bytes"]
      for new, (_, old) in zip(told, tried, strict=True) if "error" not in new
    ]
    rest = [(one, _scaled(row, max([1.0, *wanted]))) for one, row in rest]
    smaller = _beam([pair for pair in rest if pair[1]["fits"]], keep)
    told, rest = told + run(smaller), [pair for pair in rest if pair not in smaller]
    tried = tried + smaller
  told += run(_with_vmem(tried, told))
  outdone = any(row["by"] == "compiler" and row["fits"] for row in told)
  others = [row | {"outdone": outdone} for _, row in rest]
  front = [row for row in pareto(others) if row not in others[:_SHOWN]]
  return told + others[:_SHOWN] + front


def _with_vmem(tried: list, told: list[dict]) -> list:
  """The fastest that was compiled, with other amounts of fast memory."""
  good = [pair for pair in zip(tried, told, strict=True) if pair[1]["by"] == "compiler"]
  good = [pair for pair in good if pair[1]["fits"]]
  if not good:
    return []
  (best, row), _ = min(good, key=lambda pair: pair[1]["step_s"])
  return [
    (one, row | {"changes": row["changes"] | {"train.vmem_mib": one.config.train.vmem_mib}})
    for one in with_vmem(best)
  ]


def _scaled(row: dict, factor: float) -> dict:
  peak = row["peak_bytes"] * factor
  return row | {"peak_bytes": peak, "fits": peak <= row["hbm_bytes"]}


def _beam(pool: list, keep: int) -> list:
  """Picks what is compiled: the fastest of each of some meshes, then the fastest of all others."""
  chosen = _heads(pool)[: -(-keep // 2)]
  return (chosen + [pair for pair in pool if pair not in chosen])[:keep]


def _compile_all(pairs, jobs: int, compile, report, limits: Limits) -> list[dict]:
  """Compiles candidates side by side, each in the compiler's own process; rows in their order."""
  rows = {}
  with ThreadPoolExecutor(jobs or os.cpu_count()) as workers:
    futures = {
      workers.submit(compile, one.config, one.chips.name, one.chips.slices): number
      for number, (one, _) in enumerate(pairs)
    }
    for done, future in enumerate(as_completed(futures), 1):
      number = futures[future]
      rows[number] = _told(*pairs[number], future, limits)
      if rows[number]["by"] == "compiler":
        report(f"{done}/{len(pairs)} {show_row(rows[number])}")
  return [rows[number] for number in range(len(pairs))]


def _told(one: Candidate, row: dict, future, limits: Limits) -> dict:
  """A row with what the compiler said of it."""
  try:
    said = future.result()
  except Exception as error:  # one of several: the others go on
    return row | {"by": "compiler", "fits": False, "error": " ".join(str(error).split())}
  if "compiler" in said:  # why there is none
    return row | {"compiler": said["compiler"]}
  keys = ("fits", "peak_bytes", "hbm_bytes", "compile_s")
  row = row | {"by": "compiler"} | {key: said[key] for key in keys}
  if "est_step_s" not in said:
    return row
  step_s = said["est_step_s"]
  return row | {"step_s": step_s, "mfu": said["mfu"], **_costs(one, step_s, limits)}

