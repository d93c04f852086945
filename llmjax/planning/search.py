"""`plan --search`: which mesh and settings, on which slice, by formula first and the compiler then.

Formulas put thousands of candidates in order in seconds; the compiler has the last word on the few
that they like best. Neither is a measurement.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from operator import attrgetter

from llmjax.core.chips import Topology
from llmjax.core.config import flat
from llmjax.core.errors import UserError
from llmjax.planning.candidates import Candidate, meshes, of_mesh, refined
from llmjax.planning.formulas import costs
from llmjax.planning.plan import plan
from llmjax.planning.report import show_row, verdict
from llmjax.training.config import Config
from llmjax.training.runnable import check_config

_FAR = 1.5  # times the best candidate's seconds; slower ones are not looked at
_NEAR = 1.15  # times a device's memory, by formula, is still shown to the compiler
_REFINED = 4  # meshes whose best candidates are varied further,
_FULL = (1.0, 0.9)  # to fill these shares of a device's memory, as formulas err to both sides
_SHOWN = 20  # rows by formula alone, of each topology
_VMEM_MIB = 48  # of fast memory for a fusion: no formula knows what it gains
_ANSWERED = ("fits", "peak_bytes", "hbm_bytes", "compile_s", "mfu", "error", "compiler")


def search(
  config: Config,
  topologies: Sequence[Topology],
  tokens: float = 0.0,
  keep: int = 8,
  jobs: int = 0,
  compile: Callable[[Config, str, int], dict] = plan,
  report: Callable[[str], None] | None = None,
) -> dict:
  """Finds the best way to run an experiment, and where.

  The global batch stays the config's. Rows are ordered by seconds of a step; with several
  topologies by dollars of a token.

  Args:
    config: the experiment; its own mesh, ZeRO stage, accumulation, remat, attention block and
      pipeline are what is searched.
    topologies: to choose from.
    tokens: of the whole run, for its days and dollars.
    keep: how many are compiled, over all topologies at least one each; 0 compiles none. The best
      of each topology is compiled again with more fast memory.
    jobs: compiler processes at once; 0 means as many as there are cores.
    compile: `plan`, or what answers like it.
    report: called with two lines for every topology and one for every compiled candidate.
  Returns:
    `rows`, best first; `winner`, the first if it fits, else None; `fits`; `says`, the answer in one
    line; `considered`, how many had their seconds estimated; `unpriced`, chips without a price. A
    row: `topology`, `slices`, `mesh`, `changes` by dotted key, `step_s`, `by` (compiler or
    formula), `predicted_s` by formula, `mfu`, `peak_bytes`, `hbm_bytes`, `fits`, `days`, `cost_usd`
    and `usd_per_btokens` (None without a price); and `error` of one that the compiler refused.
  Raises:
    UserError: no mesh of any topology divides the model and its rows.
  """
  report = report or (lambda line: None)
  filled, rows, considered = check_config(config), [], 0
  show = functools.partial(_row, base=flat(config), tokens=tokens)
  for topology in topologies:
    report(f"{topology.name}: estimating meshes and settings by formula")
    pool, count = _pool(filled, topology)
    considered += count
    fit = sum(candidate.fits() for candidate in pool)
    report(f"{topology.name}: {count:,} candidates; {fit:,} fit and are near the best of these")
    ask = functools.partial(_compile_all, compile=compile, jobs=jobs, report=report, show=show)
    tried = _compile_best(pool, keep and max(1, keep // len(topologies)), ask)
    rows += [show(candidate, answer) for candidate, answer in tried]
    others = [one for one in pool if one not in [candidate for candidate, _ in tried]]
    rows += [show(candidate) for candidate in others[:_SHOWN]]
  if not rows:
    names = ", ".join(topology.name for topology in topologies)
    raise UserError(f"no mesh of {names} divides this model and {config.data.batch_size} rows")
  compiled = {row["topology"] for row in rows if row["by"] == "compiler" and row["fits"]}
  rows.sort(key=lambda row: (
    "error" in row, not row["fits"], row["by"] == "formula" and row["topology"] in compiled,
    len(topologies) > 1 and (row["usd_per_btokens"] is None, row["usd_per_btokens"] or 0),
    row["step_s"],
  ))
  unpriced = sorted({each.chip.name for each in topologies if not each.chip.usd_per_hour})
  return {
    "winner": rows[0] if rows[0]["fits"] else None,
    "fits": rows[0]["fits"], "says": verdict(rows[0], unpriced),
    "considered": considered, "unpriced": unpriced, "rows": rows,
  }


def _pool(config: Config, topology: Topology) -> tuple[list[Candidate], int]:
  """Those near the fastest that fits, else the one that wants least; and how many were estimated.

  With all layers recomputed a mesh needs least memory and at most 4/3 of its seconds, so other
  settings are tried on meshes alone that fit so and are not slower than that.
  """
  tried = []
  for sizes in meshes(config, topology):
    mesh = config, topology, sizes, sizes.pop("across")
    tried.append((mesh, list(of_mesh(*mesh, ("full",)))))
  recomputed = [candidate for _, found in tried for candidate in found]
  fitting = [candidate.step_s for candidate in recomputed if candidate.fits()]
  if not fitting:
    return sorted(recomputed, key=attrgetter("peak_bytes"))[:1], len(recomputed)
  limit_s = 4 / 3 * min(fitting)
  every = [
    candidate for mesh, found in tried
    if any(one.step_s <= limit_s and one.fits() for one in found) for candidate in of_mesh(*mesh)
  ]
  count = len(recomputed) + sum(one.config.model.remat != "full" for one in every)
  pool = sorted((one for one in every if one.fits()), key=attrgetter("step_s"))
  pool = [candidate for candidate in pool if candidate.step_s <= _FAR * pool[0].step_s]
  for candidate in _best_per_mesh(pool)[:_REFINED]:
    finer = sorted(refined(candidate), key=attrgetter("step_s"))
    for share in _FULL:
      near = next((one for one in finer if one.fits(share)), None)
      pool += [near] if near and near.config not in [one.config for one in pool] else []
  return sorted(pool, key=attrgetter("step_s")), count


def _best_per_mesh(pool: list[Candidate]) -> list[Candidate]:
  best = {}
  for candidate in pool:
    best.setdefault(tuple(candidate.sizes.values()), candidate)
  return list(best.values())


def _beam(pool: list[Candidate], keep: int) -> list[Candidate]:
  """Picks what is compiled: the fastest of each of some meshes, then the fastest of all others."""
  chosen = _best_per_mesh(pool)[: -(-keep // 2)]
  return (chosen + [candidate for candidate in pool if candidate not in chosen])[:keep]


def _compile_best(pool: list[Candidate], keep: int, ask: Callable) -> list[tuple[Candidate, dict]]:
  """Compiles the best of a pool: pairs with the compiler's answers.

  Where none of these fits, formulas' bytes are scaled by what the compiler wanted, and there is one
  more round. The last is for what no formula knows, more fast memory for the best.
  """
  tried = ask(_beam([candidate for candidate in pool if candidate.fits(_NEAR)], keep))
  if tried and not any(answer["fits"] for _, answer in tried):
    wanted = [
      answer["peak_bytes"] / candidate.peak_bytes
      for candidate, answer in tried if "error" not in answer
    ]
    asked = [candidate for candidate, _ in tried]
    left = [one for one in pool if one not in asked and one.fits(1 / max([1.0, *wanted]))]
    tried += ask(_beam(left, keep))
  good = [pair for pair in tried if pair[1]["fits"] and "est_step_s" in pair[1]]
  best, _ = min(good, key=lambda pair: pair[1]["est_step_s"], default=(None, None))
  if best and best.chips.chip.name != "v4" and best.config.train.vmem_mib != _VMEM_MIB:
    tried += ask([best.but(**{"train.vmem_mib": _VMEM_MIB})])
  return tried


def _compile_all(tried: list[Candidate], compile, jobs: int, report, show) -> list[tuple]:
  """Compiles side by side, each in the compiler's own process; answers in the candidates' order."""
  answers = {}
  with ThreadPoolExecutor(jobs or os.cpu_count()) as workers:
    futures = {
      workers.submit(compile, one.config, one.chips.name, one.chips.slices): number
      for number, one in enumerate(tried)
    }
    for future in as_completed(futures):
      number = futures[future]
      try:
        answers[number] = future.result()
      except Exception as error:  # one of several: the others go on
        answers[number] = {"fits": False, "error": " ".join(str(error).split())}
      if "compiler" not in answers[number]:
        line = show_row(show(tried[number], answers[number]))
        report(f"{len(answers)}/{len(tried)} {line}")
  return [(candidate, answers[number]) for number, candidate in enumerate(tried)]


def _row(candidate: Candidate, answer: dict | None = None, *, base: dict, tokens: float) -> dict:
  """A candidate in numbers: by formula, and where there is an answer by the compiler."""
  chips, config = candidate.chips, candidate.config
  row = {
    "topology": chips.name, "slices": chips.slices,
    "mesh": {axis: size for axis, size in candidate.sizes.items() if size > 1},
    # A mesh axis of -1 takes what is left, whatever the others are.
    "changes": {key: new for key, new in candidate.changes.items() if base[key] not in (new, -1)},
    "by": "formula", "predicted_s": candidate.step_s, "step_s": candidate.step_s,
    "mfu": candidate.estimate.mfu, "peak_bytes": candidate.peak_bytes, "fits": candidate.fits(),
    "hbm_bytes": chips.chip.hbm_bytes / chips.chip.devices,
  }
  if answer:
    row |= {key: answer[key] for key in _ANSWERED if key in answer}
    row["by"] = "formula" if "compiler" in answer else "compiler"
    row["step_s"] = answer.get("est_step_s", row["step_s"])
  tokens_per_s = config.data.batch_size * config.model.max_seq_len / row["step_s"]
  bill = costs(chips, tokens_per_s, tokens)
  return row | {
    "days": bill.get("run_days", 0.0), "cost_usd": bill.get("run_cost_usd"),
    "usd_per_btokens": bill["cost_usd_per_btokens"],
  }
