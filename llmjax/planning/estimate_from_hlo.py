"""Seconds and FLOPs of a compiled program by its own text: fusions, kernels, links.

The TPU's compiler writes an estimate of cycles on every fusion; loops run theirs many times, which
is multiplied out here. Of kernels it knows next to nothing: their FLOPs come from formulas, their
seconds from the chip's peak. None of this is a measurement.
"""

import collections
import dataclasses
import re
from collections.abc import Callable

from llmjax.core.chips import Chip
from llmjax.models.formulas import kernel_flops
from llmjax.parallel.collectives import Collective
from llmjax.parallel.hlo import Run, dims, numbers, product_flops, walk

_NONE = 2**63 - 1  # where the compiler has no estimate


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Estimated seconds of one run of a program on one device.

  Attributes:
    fusions_s: cycles that the compiler estimated, times how often they run.
    kernels_s: kernels' FLOPs at the chip's peak.
    kernels: runs of kernels, by name.
    flops: of products and kernels, a multiply-add as two.
    ici_s: what collectives put on links inside a slice, at the links' rate.
    dcn_s: the same between slices.
    exposed_s: of both, what a device waits for.
  """

  fusions_s: float
  kernels_s: float
  kernels: dict
  flops: float
  ici_s: float
  dcn_s: float
  exposed_s: float

  @property
  def step_s(self) -> float:
    """Work and waiting."""
    return self.fusions_s + self.kernels_s + self.exposed_s


def estimate_from_hlo(
  hlo_text: str,
  found: list[Collective],
  chip: Chip,
  *,
  seen: Callable[[int, int], float] = lambda length, block: 1.0,
  filled: float = 1.0,
) -> Estimate:
  """Adds up a program's text.

  Splash attention computes whole blocks, those that its mask touches: what share they are is asked
  of `seen`. Products of grouped rows skip rows that are of no group: `filled` says how many are.
  Softmax, memory and the pipeline inside a kernel cost nothing here, so kernels are estimated too
  fast; of a kernel that is neither only runs are counted. Of a conditional's branches the one
  with most work is taken, since devices that take another wait for it.

  Args:
    hlo_text: optimized HLO of a TPU's compiler.
    found: its collectives, read from the same text.
    chip: what it runs on.
    seen: (length, block) → share of attention's blocks that are computed, as
      `models.formulas.seen_share` gives for a config.
    filled: share of grouped rows that are of some group, as `models.formulas.filled_share` gives.
  """
  rate = chip.peak("bfloat16") / chip.devices
  total, kernels, runs = collections.Counter(), collections.Counter(), list(walk(hlo_text))
  fused_s = [_fusion_s(run, chip) for run in runs]
  kernel = [_is_kernel(run) and _kernel(run, seen, filled) * run.count for run in runs]
  work_s = [fusion + flops / rate for fusion, flops in zip(fused_s, kernel, strict=True)]
  taken = _taken(runs, work_s)
  for place in sorted(taken):
    run = runs[place]
    total["fusions_s"] += fused_s[place]
    total["kernels_s"] += kernel[place] / rate
    total["flops"] += kernel[place] + product_flops(run.op, run.body) * run.count
    kernels.update({_name(run): run.count} if _is_kernel(run) else {})
  found = [one for one in found if one.start in taken]
  links = {dcn: sum(link_s(one, chip) for one in found if one.dcn == dcn) for dcn in (False, True)}
  work_s = [seconds * (place in taken) for place, seconds in enumerate(work_s)]
  return Estimate(
    total["fusions_s"], total["kernels_s"], dict(kernels), total["flops"], links[False],
    links[True], _waited(work_s, found, chip),
  )


def _fusion_s(run: Run, chip: Chip) -> float:
  cycles = int(run.op.find(r'"estimated_cycles":"(\d+)"') or _NONE)
  return run.count * cycles / chip.clock_hz if cycles < _NONE and not run.fused else 0.0


def _is_kernel(run: Run) -> bool:
  return run.op.code == "custom-call" and "tpu_custom_call" in run.op.attributes


def _taken(runs: list[Run], work_s: list[float]) -> set[int]:
  """Places of what runs if every conditional takes its longest branch."""
  branches = collections.Counter()
  for run, seconds in zip(runs, work_s, strict=True):
    for depth in range(len(run.path)):
      branches[run.path[: depth + 1]] += seconds
  longest = {}
  for path, seconds in branches.items():
    one = (path[:-1], path[-1][:2])
    if one not in longest or seconds > branches[longest[one]]:
      longest[one] = path
  ways = set(longest.values())
  return {
    place for place, run in enumerate(runs)
    if all(run.path[: depth + 1] in ways for depth in range(len(run.path)))
  }


def _name(run: Run) -> str:
  """A kernel's own name, which its instruction has without the compiler's numbers."""
  return re.sub(r"(\.clone|\.\d+)+$", "", run.op.name)


def _kernel(run: Run, seen: Callable[[int, int], float], filled: float) -> float:
  """FLOPs of one execution of a kernel by its operands' shapes."""
  shapes = [run.body[name].shape for name in run.op.operands]
  operands = [("f" if re.match(r"(bf|f)\d", shape) else "i", dims(shape)) for shape in shapes]
  made = [numbers(sizes) for sizes in re.findall(r"\[([\d,]+)\]", run.op.shape)]
  return kernel_flops(_name(run), operands, made, seen, filled)


def link_s(one: Collective, chip: Chip) -> float:
  """Seconds of all executions of a collective at the rate of the links it uses, and no latency.

  A device of n passes on (n - 1)/n of what is gathered, scattered or exchanged, twice that of what
  is reduced and kept by all; rows of an all-to-all go n/4 devices far on a ring. Wrap-around links
  are taken to be there, which small slices of some chips do not have.

  Source: Austin et al. 2025, "How to Scale Your Model", ch. 3.
  """
  part = (one.ways - 1) / one.ways
  times = {"all-reduce": 2 * part, "collective-permute": 1.0, "collective-broadcast": 1.0}
  if "all-to-all" in one.kind and not one.dcn:
    times[one.kind] = max(part, one.ways / 4)
  moved = one.bytes * one.count * times.get(one.kind, part) * chip.devices
  return moved / (chip.dcn_rate if one.dcn else min(one.links, chip.links) * chip.link_rate)


def _waited(work_s: list[float], found: list[Collective], chip: Chip) -> float:
  """Seconds that a device waits for links, running a program in the order it is written.

  Links carry one collective after another, those between slices apart from the others; work goes
  on until what must have ended has not. A loop's executions are taken as one, all of them long.

  Args:
    work_s: of every instruction, by its place.
    found: collectives.
    chip: what the program runs on.
  """
  begun, ended = collections.defaultdict(list), collections.defaultdict(list)
  for one in found:
    begun[one.start].append(one)
    ended[one.done].append(one)
  now = waited = 0.0
  free, ends = collections.Counter(), {}
  for place, seconds in enumerate(work_s):
    now += seconds
    for one in begun[place]:
      free[one.dcn] = ends[one] = max(now, free[one.dcn]) + link_s(one, chip)
    for one in ended[place]:
      wait = max(0.0, ends[one] - now)
      now, waited = now + wait, waited + wait
  return waited
