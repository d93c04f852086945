"""Seconds of a compiled program by its own text: fusions, kernels, links.

The TPU's compiler writes an estimate of cycles on every fusion; loops run theirs many times, which
is multiplied out here. Of kernels it knows next to nothing: their FLOPs come from formulas, at the
chip's peak. None of this is a measurement.
"""

import collections
import dataclasses

from llmjax.parallel.collectives import Collective
from llmjax.parallel.hlo import walk
from llmjax.plan.chips import Chip

_KERNELS = ("splash", "gmm")  # in jax's names of what made a custom call
_HALF = {"all-reduce": 2.0}  # all others pass each byte on once


@dataclasses.dataclass(frozen=True)
class Recount:
  """Estimated seconds of one run of a program on one device.

  Attributes:
    fusions_s: cycles that the compiler estimated, times how often they run.
    kernels: runs of kernels, by name.
    ici_s: what collectives put on links inside a slice, at the links' rate.
    dcn_s: the same between slices.
    exposed_s: of both, what no fusion runs beside.
  """

  fusions_s: float
  kernels: dict
  ici_s: float
  dcn_s: float
  exposed_s: float


def recount(hlo_text: str, found: list[Collective], chip: Chip, across: str = "") -> Recount:
  """Adds up a program's text.

  Args:
    hlo_text: optimized HLO of a TPU's compiler.
    found: its collectives.
    chip: what it runs on.
    across: mesh axis that crosses slices; "" if none does.
  """
  cycles, kernels = 0, collections.Counter()
  for run in walk(hlo_text):
    if run.fused:
      continue
    if said := run.op.find(r'"estimated_cycles":"(\d+)"'):
      cycles += int(said) * run.count
    elif run.op.find(r'custom_call_target="(tpu_custom_call)"'):
      name = next((name for name in _KERNELS if name in run.origin), "other")
      kernels[name] += run.count
  times = [(one, link_s(one, chip, across)) for one in found]
  slow = sum(seconds for one, seconds in times if across in one.axes)
  return Recount(
    cycles / chip.clock_hz, dict(kernels), sum(seconds for _, seconds in times) - slow, slow,
    sum(seconds for one, seconds in times if not one.overlapped),
  )


def link_s(one: Collective, chip: Chip, across: str = "") -> float:
  """Seconds of a collective at the rate of its links: a ring over one dimension, both ways."""
  moved = one.bytes * one.count * _HALF.get(one.kind, 1.0)
  if across and across in one.axes:
    return moved / chip.dcn_rate
  return moved * chip.devices / (min(2, chip.links) * chip.link_rate)
