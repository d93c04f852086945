"""Pipeline schedules as tables of ticks × stages, with a buffer slot for every value. A stage holds
one or more chunks of layers; chunk c on stage s is virtual stage c · stages + s, so activations
always go to the next stage of the ring and gradients to the previous one."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from llmjax.core.errors import UserError, nearest

KINDS = ("gpipe", "1f1b", "interleaved", "zb_h1")
CODES = {"F": 1, "B": 2, "W": 3}  # in Tables.kind; 0 is idle


class Action(NamedTuple):
  """A stage's action in one tick, for one chunk and one microbatch.

  F is the forward pass; B the gradient of the input, and in schedules without W also of the
  weights; W the gradient of the weights.
  """

  kind: str
  chunk: int
  microbatch: int

  def __str__(self):
    return f"{self.kind} of chunk {self.chunk}, microbatch {self.microbatch}"


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A schedule: `table[tick][stage]` is an `Action` or None.

  A tick's results reach the neighbouring stage before the next tick.
  """

  kind: str
  stages: int
  microbatches: int
  chunks: int
  table: tuple[tuple[Action | None, ...], ...]

  def timeline(self, forward=1, backward=1, weight=1) -> list[list[tuple]]:
    """Runs each stage's actions in order, each as soon as its inputs exist; sends take no time.

    Args:
      forward: time of one chunk's F, any unit.
      backward: time of the gradient of the input.
      weight: time of the gradient of the weights; a B that is not split takes backward + weight.
    Returns:
      For each stage, (start, end, `Action`) in order.
    Raises:
      UserError: a deadlock.
    """
    fused = 0 if self.kind == "zb_h1" else weight
    times = {"F": forward, "B": backward + fused, "W": weight}
    orders = [[action for action in column if action] for column in zip(*self.table, strict=True)]
    return _simulate(orders, self.chunks, times)

  def bubble_fraction(self, forward=1, backward=1, weight=1) -> float:
    """Idle share of the stages' time: 1 − busy / (stages · length of the `timeline`)."""
    lines = self.timeline(forward, backward, weight)
    busy = sum(end - start for line in lines for start, end, _ in line)
    return 1 - busy / (self.stages * max(line[-1][1] for line in lines))


@functools.cache
def make_schedule(kind: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
  """Makes a schedule: each stage's order of actions, each in the first tick possible.

  Every kind is some warm-up forwards, then one forward and one backward in turn:
    gpipe: all forwards first.
    1f1b: p − s − 1 warm-up forwards on stage s of p; min(m, p − s) microbatches are alive.
    interleaved: 1f1b over chunks ≥ 2, in rounds of p microbatches a chunk; the bubble is
      (p − 1) / (chunks · m + p − 1), for more activations alive and chunks times the sends.
    zb_h1: 1f1b whose W are delayed by s backwards and fill the bubble down to p − 1 times
      forward + backward − weight (m ≥ p, weight ≤ backward), with at most min(m, p) microbatches
      alive on any stage, as 1f1b has on stage 0.

  Args:
    kind: one of `KINDS`.
    stages: length of the pipeline, p ≥ 1.
    microbatches: m ≥ 1; a multiple of `stages` when interleaved.
    chunks: virtual stages on each stage; 1 unless interleaved.
  Raises:
    UserError: the kind is unknown, or the numbers do not work for it.
  Source: GPipe, Huang et al. 2018, arXiv:1811.06965; 1F1B, Narayanan et al. 2019 (PipeDream), as
    flushed and interleaved in Narayanan et al. 2021, arXiv:2104.04473, §2.2; ZB-H1, Qi et al.
    2023, arXiv:2401.10241, §2.1.
  """
  check_numbers(kind, stages, microbatches, chunks)
  orders = [_order(kind, stage, stages, microbatches, chunks) for stage in range(stages)]
  lines = _simulate(orders, chunks, {"F": 1, "B": 1, "W": 1})
  at = {(tick, stage): act for stage, line in enumerate(lines) for tick, _, act in line}
  ticks = range(max(at)[0] + 1)
  table = tuple(tuple(at.get((tick, stage)) for stage in range(stages)) for tick in ticks)
  return Schedule(kind, stages, microbatches, chunks, table)


def check_numbers(kind: str, stages: int, microbatches: int, chunks: int):
  """Raises a `UserError` where a kind has no schedule for such numbers."""
  if kind not in KINDS:
    raise UserError(f"no pipeline schedule {kind!r}; {nearest(kind, KINDS)}")
  for name, count in (("stage", stages), ("microbatch", microbatches), ("chunk", chunks)):
    if count < 1:
      raise UserError(f"a pipeline schedule needs at least one {name}, not {count}")
  if (kind == "interleaved") != (chunks > 1):
    wanted = "two chunks a stage or more" if kind == "interleaved" else "one chunk a stage"
    raise UserError(f"schedule {kind!r} has {wanted}, not {chunks}")
  if kind == "interleaved" and microbatches % stages:
    raise UserError(
      f"schedule 'interleaved' goes in rounds of one microbatch a stage: {microbatches} "
      f"microbatches are not a multiple of {stages} stages"
    )


def _order(kind, stage, stages, microbatches, chunks) -> list[Action]:
  # The chunks take turns in rounds of `stages` microbatches (Megatron-LM); one chunk: 0, 1, 2, …
  turns = [(chunk, microbatch) for chunk in range(chunks) for microbatch in range(microbatches)]
  turns.sort(key=lambda turn: (turn[1] // stages, turn))
  after = stages - stage - 1
  interleaved = 2 * after + (chunks - 1) * stages
  warmup = {"gpipe": len(turns), "interleaved": interleaved}.get(kind, after)
  forwards = [Action("F", *turn) for turn in turns]
  order = forwards[:warmup]
  for done, (chunk, microbatch) in enumerate(turns):
    order += forwards[warmup + done : warmup + done + 1]
    order.append(Action("B", chunks - 1 - chunk, microbatch))
    if kind == "zb_h1" and done >= stage:
      order.append(Action("W", 0, done - stage))
  if kind == "zb_h1":
    order += [Action("W", 0, late) for late in range(max(0, microbatches - stage), microbatches)]
  return order


def _needs(stage, action, stages, chunks) -> list[tuple[int, Action]]:
  """The (stage, action) pairs that must run before, the neighbour's first."""
  kind, chunk, microbatch = action
  virtual = chunk * stages + stage + (1 if kind == "B" else -1)
  needs = []
  if kind != "W" and 0 <= virtual < stages * chunks:
    needs.append((virtual % stages, Action(kind, virtual // stages, microbatch)))
  if kind != "F":
    needs.append((stage, Action("F" if kind == "B" else "B", chunk, microbatch)))
  return needs


def _simulate(orders, chunks, times) -> list[list[tuple]]:
  ends, lines = {}, [[] for _ in orders]
  moved = True
  while moved:
    moved = False
    for stage, (order, line) in enumerate(zip(orders, lines, strict=True)):
      for action in order[len(line) :]:
        needs = _needs(stage, action, len(orders), chunks)
        if any(need not in ends for need in needs):
          break
        start = max([ends[need] for need in needs] + [line[-1][1] if line else 0])
        ends[stage, action] = start + times[action.kind]
        line.append((start, ends[stage, action], action))
        moved = True
  for stage, (order, line) in enumerate(zip(orders, lines, strict=True)):
    if len(line) < len(order):
      raise UserError(f"the schedule stops: stage {stage} waits for ever at {order[len(line)]}")
  return lines


class Buffer(NamedTuple):
  """Slots of one kind of value: int32 [tick, stage], −1 for none."""

  read: np.ndarray
  write: np.ndarray

  @property
  def slots(self) -> tuple[int, ...]:
    """How many slots each stage needs."""
    return tuple((self.write.max(axis=0) + 1).tolist())


class Tables(NamedTuple):
  """A schedule with a buffer slot for every value; arrays are int32 [tick, stage].

  In a tick a stage reads, computes, writes `saved` and `pending`, sends, and finally writes what
  it received, perhaps to a slot that it read in the same tick.

  Attributes:
    kind: 0 idle, or `CODES` of F, B, W.
    chunk: the stage's chunk, and `microbatch`: 0 when idle.
    saved: inputs of chunks: F writes; B and W read.
    activation: activations from stage − 1, read by F; virtual stage 0 embeds tokens instead.
    gradient: gradients from stage + 1, read by B; the last virtual stage has the loss instead.
    pending: the output's gradients that W needs: B writes, W reads.
  """

  kind: np.ndarray
  chunk: np.ndarray
  microbatch: np.ndarray
  saved: Buffer
  activation: Buffer
  gradient: Buffer
  pending: Buffer

  @property
  def buffers(self) -> tuple[Buffer, ...]:
    """saved, activation, gradient, pending."""
    return self[3:]


def tables(schedule: Schedule) -> Tables:
  """Allocates a buffer slot for every value that outlives its tick."""
  shape = len(schedule.table), schedule.stages
  at = {
    (stage, action): tick
    for tick, actions in enumerate(schedule.table) for stage, action in enumerate(actions) if action
  }
  kind, chunk, microbatch = doing = np.zeros((3, *shape), np.int32)
  lives = {"FF": {}, "BB": {}, "FB": {}, "BW": {}}  # writer, reader: {(written, stage): [read, …]}
  for (stage, action), tick in at.items():
    doing[:, tick, stage] = CODES[action.kind], action.chunk, action.microbatch
    for need in _needs(stage, action, schedule.stages, schedule.chunks):
      lives[need[1].kind + action.kind].setdefault((at[need], stage), []).append(tick)
    if action.kind == "W":
      lives["FB"][at[stage, action._replace(kind="F")], stage].append(tick)
  buffers = (_allocate(lives[pair], shape) for pair in ("FB", "FF", "BB", "BW"))
  return Tables(kind, chunk, microbatch, *buffers)


def _allocate(lives, shape) -> Buffer:
  read, write = np.full((2, *shape), -1, np.int32)
  last_reads = [[] for _ in range(shape[1])]  # of each stage's slots
  for (written, stage), reads in sorted(lives.items()):
    last = last_reads[stage]
    slot = next((slot for slot, tick in enumerate(last) if tick <= written), len(last))
    last[slot : slot + 1] = [reads[-1]]
    write[written, stage] = read[reads, stage] = slot
  return Buffer(read, write)
