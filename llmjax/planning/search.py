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
  topologies: Sequence[Topology],
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
  for topology in topologies:
    report(f"{topology.name}: estimating meshes and knobs by formula")
    pool, count = _pool(filled, topology, flat(config), limits)
    considered += count
    fit = sum(row["fits"] for _, row in pool)
    report(f"{topology.name}: {count:,} candidates; {fit:,} fit and are near the best of these")
    rows += _compiled(pool, keep and max(1, keep // len(topologies)), jobs, compile, report, limits)
  if not rows:
    names = ", ".join(topology.name for topology in topologies)
    raise UserError(f"no mesh of {names} divides this model and {config.data.batch_size} rows")
  by_days = limits.budget_usd and not limits.max_days
  rows.sort(key=lambda row: (*_disqualifiers(row), *_ranking(row, len(topologies) > 1, by_days)))
  winner = rows[0] if rows[0]["fits"] and rows[0]["within"] else None
  unpriced = {p.chip.name for p in topologies if not (limits.usd_per_hour or p.chip.usd_per_hour)}
  return {
    "winner": winner, "fits": rows[0]["fits"], "says": says(rows[0], limits, unpriced),
    "considered": considered, "unpriced": sorted(unpriced), "rows": rows,
  }


def _disqualifiers(row: dict) -> tuple:
  """What puts a row behind others, worst first."""
  return "error" in row, not row["fits"], not row["within"], row["outdone"]


def _ranking(row: dict, several: bool, by_days: bool) -> tuple:
  """What puts a row behind others of its kind: no price, dollars or, within a budget, days."""
  if not several:
    return (row["step_s"],)
  slow = row["days"] if by_days and row["within"] else row["usd_per_btokens"]
  return row["usd_per_btokens"] is None, slow or 0, row["step_s"]


def _pool(config: Config, topology: Topology, base: dict, limits: Limits) -> tuple[list, int]:
  """Pairs (candidate, row) of those that fit by formula, fastest first; and how many there were.

  Walks in order of predicted seconds and stops where they are far above the first that fits, so
  the best by formula is always among them. If nothing fits: the one that wants least.
  """
  ranked = [(estimate(candidate), candidate) for candidate in candidates(config, topology)]
  ranked.sort(key=lambda pair: pair[0].step_s)
  pool, least = [], None
  for estimated, candidate in ranked:
    if pool and estimated.step_s > _FAR * pool[0][1]["step_s"]:
      break
    row = _row(candidate, estimated, base, limits)
    if row["fits"]:
      pool.append((candidate, row))
    elif least is None or row["peak_bytes"] < least[1]["peak_bytes"]:
      least = candidate, row
  if not pool:
    return [least] if least else [], len(ranked)
  best = _best_per_mesh(pool)[:_REFINED]
  for candidate, _ in best:
    finer = [(other, _row(other, estimate(other), base, limits)) for other in refined(candidate)]
    finer.sort(key=lambda pair: pair[1]["step_s"])
    for share in _FULL:
      near = [pair for pair in finer if pair[1]["peak_bytes"] <= share * pair[1]["hbm_bytes"]]
      have = [candidate.config for candidate, _ in pool]
      pool += [pair for pair in near[:1] if pair[0].config not in have]
  return sorted(pool, key=lambda pair: pair[1]["step_s"]), len(ranked)


def _best_per_mesh(pool: list) -> list:
  """The fastest of each mesh, in order."""
  best = {}
  for pair in pool:
    best.setdefault(str(pair[1]["mesh"]), pair)
  return list(best.values())


def _row(candidate: Candidate, estimated: Estimate, base: dict, limits: Limits) -> dict:
  """A candidate in numbers, by formula."""
  chip = candidate.chips.chip
  peak, hbm = memory(candidate.config, candidate.sizes, chip).peak, chip.hbm_bytes / chip.devices
  return {
    "topology": candidate.chips.name, "slices": candidate.chips.slices,
    "mesh": {axis: size for axis, size in candidate.sizes.items() if size > 1},
    "changes": {key: value for key, value in candidate.changes.items() if base[key] != value},
    "by": "formula", "predicted_s": estimated.step_s, "step_s": estimated.step_s,
    "mfu": estimated.mfu,
    "peak_bytes": peak, "hbm_bytes": hbm, "fits": peak <= hbm, "outdone": False,
    **_costs(candidate, estimated.step_s, limits),
  }


def _costs(candidate: Candidate, step_s: float, limits: Limits) -> dict:
  chips, config = candidate.chips, candidate.config
  tokens = config.data.batch_size * config.model.max_seq_len
  price = limits.usd_per_hour or chips.chip.usd_per_hour
  days_per_token = step_s / tokens / DAY_S
  days = limits.tokens * days_per_token
  usd_per_day = rent_usd(chips.chip, chips.chips, 24, price) if price else None
  usd = usd_per_day and usd_per_day * days
  over_budget = limits.budget_usd > 0 and (usd is None or usd > limits.budget_usd)
  return {
    "days": days, "cost_usd": usd,
    "usd_per_btokens": usd_per_day and usd_per_day * days_per_token * 1e9,
    "within": not over_budget and not 0 < limits.max_days < days,
  }


def _compiled(pool, keep: int, jobs: int, compile, report, limits: Limits) -> list[dict]:
  """The rows of a pool, the best of them by the compiler's estimate.

  Where none of these fits, formulas' bytes are scaled by what the compiler wanted, and there is one
  more round. The last goes over what no formula knows, the fast memory of the best.
  """
  run = lambda pairs: _compile_all(pairs, jobs, compile, report, limits)  # noqa: E731
  near = [pair for pair in pool if pair[1]["peak_bytes"] <= _NEAR * pair[1]["hbm_bytes"]]
  tried = _beam(near, keep)
  compiled_rows, rest = run(tried), [pair for pair in pool if pair not in tried]
  if tried and not any(row["fits"] for row in compiled_rows):
    wanted = [
      new["peak_bytes"] / old["peak_bytes"]
      for new, (_, old) in zip(compiled_rows, tried, strict=True) if "error" not in new
    ]
    rest = [(candidate, _scaled(row, max([1.0, *wanted]))) for candidate, row in rest]
    smaller = _beam([pair for pair in rest if pair[1]["fits"]], keep)
    compiled_rows += run(smaller)
    rest = [pair for pair in rest if pair not in smaller]
    tried = tried + smaller
  compiled_rows += run(_with_vmem(tried, compiled_rows))
  outdone = any(row["by"] == "compiler" and row["fits"] for row in compiled_rows)
  others = [row | {"outdone": outdone} for _, row in rest]
  front = [row for row in pareto(others) if row not in others[:_SHOWN]]
  return compiled_rows + others[:_SHOWN] + front


def _with_vmem(tried: list, compiled_rows: list[dict]) -> list:
  """The fastest that was compiled, with other amounts of fast memory."""
  good = [pair for pair in zip(tried, compiled_rows, strict=True) if pair[1]["by"] == "compiler"]
  good = [pair for pair in good if pair[1]["fits"]]
  if not good:
    return []
  (best, row), _ = min(good, key=lambda pair: pair[1]["step_s"])
  return [
    (other, row | {"changes": row["changes"] | {"train.vmem_mib": other.config.train.vmem_mib}})
    for other in with_vmem(best)
  ]


def _scaled(row: dict, factor: float) -> dict:
  peak = row["peak_bytes"] * factor
  return row | {"peak_bytes": peak, "fits": peak <= row["hbm_bytes"]}


def _beam(pool: list, keep: int) -> list:
  """Picks what is compiled: the fastest of each of some meshes, then the fastest of all others."""
  chosen = _best_per_mesh(pool)[: -(-keep // 2)]
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
      rows[number] = _with_result(*pairs[number], future, limits)
      if rows[number]["by"] == "compiler":
        report(f"{done}/{len(pairs)} {show_row(rows[number])}")
  return [rows[number] for number in range(len(pairs))]


def _with_result(candidate: Candidate, row: dict, future, limits: Limits) -> dict:
  """A row with what the compiler said of it."""
  try:
    result = future.result()
  except Exception as error:  # one of several: the others go on
    return row | {"by": "compiler", "fits": False, "error": " ".join(str(error).split())}
  if "compiler" in result:  # why there is none
    return row | {"compiler": result["compiler"]}
  keys = ("fits", "peak_bytes", "hbm_bytes", "compile_s")
  row = row | {"by": "compiler"} | {key: result[key] for key in keys}
  if "est_step_s" not in result:
    return row
  step_s = result["est_step_s"]
  return row | {"step_s": step_s, "mfu": result["mfu"], **_costs(candidate, step_s, limits)}

