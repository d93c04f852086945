"""Seconds of a compiled program by its own text: fusions, kernels, links; not a measurement.

The TPU's compiler writes an estimate of cycles on every fusion. Of kernels it knows next to
nothing: their FLOPs come from formulas, their seconds from the chip's peak.
"""

import collections
import dataclasses
import re
from collections.abc import Callable

import numpy as np

from llmjax.core.chips import Chip
from llmjax.models.formulas import kernel_flops
from llmjax.parallel.collectives import Collective
from llmjax.parallel.hlo import Run, dims, numbers, walk

_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has none


@dataclasses.dataclass(frozen=True)
class ProgramTime:
  """Estimated seconds of one run of a program on one device.

  Attributes:
    fusions_s: cycles that the compiler estimated, times how often they run.
    kernels_s: kernels' FLOPs at the chip's peak.
    ici_s: what collectives put on links inside a slice, at the links' rate.
    dcn_s: the same between slices.
    exposed_s: of both, what a device waits for.
  """

  fusions_s: float
  kernels_s: float
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
) -> ProgramTime:
  """Adds up a program's text.

  Splash attention computes whole blocks, those that its mask touches: what share they are is asked
  of `seen`. Products of grouped rows skip rows that are of no group: `filled` says how many are.
  Softmax, memory and the pipeline inside a kernel cost nothing here, so kernels are estimated too
  fast; a kernel that is neither costs nothing. Of a conditional's branches the one with most work
  is taken, since devices that take another wait for it.

  Args:
    hlo_text: optimized HLO of a TPU's compiler.
    found: its collectives, read from the same text.
    chip: what it runs on.
    seen: (length, block) → share of attention's blocks that are computed, as
      `models.formulas.seen_share` gives for a config.
    filled: share of grouped rows that are of some group, as `models.formulas.filled_share` gives.
  """
  rate, runs = chip.peak("bfloat16") / chip.devices, list(walk(hlo_text))
  fusions_s = np.array([_fusion_s(run, chip) for run in runs])
  kernels_s = np.array([_kernel_flops(run, seen, filled) * run.count / rate for run in runs])
  executed = np.array(_executed(runs, fusions_s + kernels_s))
  fusions_s, kernels_s = fusions_s * executed, kernels_s * executed
  found = [each for each in found if executed[each.start]]
  ici_s, dcn_s = (
    sum(link_s(each, chip) for each in found if each.dcn == dcn) for dcn in (False, True)
  )
  exposed_s = _exposed_s((fusions_s + kernels_s).tolist(), found, chip)
  return ProgramTime(float(fusions_s.sum()), float(kernels_s.sum()), ici_s, dcn_s, exposed_s)


def _fusion_s(run: Run, chip: Chip) -> float:
  cycles = int(run.op.find(r'"estimated_cycles":"(\d+)"') or _NO_ESTIMATE)
  return run.count * cycles / chip.clock_hz if cycles < _NO_ESTIMATE and not run.fused else 0.0


def _kernel_flops(run: Run, seen: Callable[[int, int], float], filled: float) -> float:
  """FLOPs of one execution of a kernel by its operands' shapes; 0 of anything else."""
  if run.op.code != "custom-call" or "tpu_custom_call" not in run.op.attributes:
    return 0.0
  name = re.sub(r"(\.clone|\.\d+)+$", "", run.op.name)  # without the compiler's numbers
  shapes = [run.body[operand].shape for operand in run.op.operands]
  operands = [("f" if re.match(r"(bf|f)\d", shape) else "i", dims(shape)) for shape in shapes]
  results = [numbers(sizes) for sizes in re.findall(r"\[([\d,]+)\]", run.op.shape)]
  return kernel_flops(name, operands, results, seen, filled)


def _executed(runs: list[Run], work_s) -> list[bool]:
  """What is executed if every conditional takes its longest branch."""
  branches = collections.Counter()
  for run, seconds in zip(runs, work_s, strict=True):
    for depth in range(len(run.path)):
      branches[run.path[: depth + 1]] += seconds
  longest = {}
  for path, seconds in branches.items():
    conditional = (path[:-1], path[-1][:2])
    if conditional not in longest or seconds > branches[longest[conditional]]:
      longest[conditional] = path
  taken = set(longest.values())
  return [all(run.path[: d + 1] in taken for d in range(len(run.path))) for run in runs]


def link_s(one: Collective, chip: Chip) -> float:
  """Seconds of all executions of a collective at the rate of the links it uses, and no latency.

  A device of n passes on (n - 1)/n of what is gathered, scattered or exchanged, twice that of what
  is reduced and kept by all; rows of an all-to-all go n/4 devices far on a ring. Wrap-around links
  are taken to be there, which small slices of some chips do not have.

  Source: Austin et al. 2025, "How to Scale Your Model", ch. 3.
  """
  part = (one.shards - 1) / one.shards
  times = {"all-reduce": 2 * part, "collective-permute": 1.0, "collective-broadcast": 1.0}
  if "all-to-all" in one.kind and not one.dcn:
    times[one.kind] = max(part, one.shards / 4)
  moved = one.bytes * one.count * times.get(one.kind, part) * chip.devices
  return moved / (chip.dcn_rate if one.dcn else min(one.links, chip.links) * chip.link_rate)


def _exposed_s(work_s: list[float], found: list[Collective], chip: Chip) -> float:
  """Seconds that a device waits for links, which carry one collective after another.

  A program runs in the order it is written; a loop's executions count as one, all of them long.
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
