"""Metrics: metrics.jsonl, TensorBoard and the progress line, fed one step late so nothing waits."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmjax.core.files import replace, to_json
from llmjax.training.experts import Starving
from llmjax.training.rates import Peak, StepClock

_EVERY_S = 10.0  # between plain lines of progress
# What a run's seconds go on, by name: in the loop's lines with `_s` behind it, and what is said.
_OTHER = {
  "startup": "start-up", "data_wait": "data", "evaluation": "evaluation",
  "checkpoint": "checkpoints",
}


class MetricsWriter:
  """Appends metrics to `metrics.jsonl` and TensorBoard, one object a line, in step order.

  Args:
    workdir: folder of the run.
    step: steps already done; lines of later steps, left by a run that was cut off, are dropped.
  """

  def __init__(self, workdir: Path, step: int):
    path = Path(workdir, "metrics.jsonl")
    kept = [line for line in read_metrics(workdir) if line["step"] <= step]
    replace(path, "".join(to_json(line) + "\n" for line in kept))
    self._file = path.open("a", buffering=1)
    from tensorboardX import SummaryWriter  # here, because it imports torch wherever there is one

    self._board = SummaryWriter(str(Path(workdir, "tensorboard")), purge_step=step + 1)

  def write(self, step: int, values: dict):
    """Writes one step's values; `step` comes first in the line."""
    self._file.write(to_json({"step": step, **values}) + "\n")
    for name, value in values.items():
      if not isinstance(value, list):  # a figure of each layer or expert is for metrics.jsonl
        self._board.add_scalar(name, value, step)

  def close(self):
    """Flushes and closes both files."""
    self._file.close()
    self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
  """Reads the whole lines of a run's `metrics.jsonl`; a last line cut short is left out."""
  path = Path(workdir, "metrics.jsonl")
  out = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return out


def rates(workdir: Path) -> dict:
  """Adds up what the lines of `metrics.jsonl` say of time, over all sessions of a run.

  Returns:
    `steps_s` and the seconds beside them by name; of the seconds of steps: `tokens_per_s`, None if
    no session got beyond its first step, and `mfu` or `matmul_share`.
  """
  lines = read_metrics(workdir)
  total = {f"{name}_s": sum(line.get(f"{name}_s", 0.0) for line in lines) for name in _OTHER}
  timed = [line for line in lines if "steps_s" in line]
  steps_s = sum(line["steps_s"] for line in timed)
  out = {"tokens_per_s": None, "steps_s": steps_s, **total}
  for key in ("tokens_per_s", "mfu", "matmul_share"):
    if values := [line[key] * line["steps_s"] for line in timed if key in line]:
      out[key] = sum(values) / sum(line["steps_s"] for line in timed if key in line)
  return {key: value and round(value, 6) for key, value in out.items()}


class Pending:
  """Metrics still on the device, taken off only when `depth` later steps are under way."""

  def __init__(self, depth: int = 2):
    self._depth = depth
    self._queue = deque()

  def add(self, step: int, values, mark=None):
    """Queues a step's device values; returns the (step, host values, mark) that are due."""
    self._queue.append((step, values, mark))
    return self._take(len(self._queue) - self._depth)

  def flush(self):
    """Returns everything queued, waiting for it."""
    return self._take(len(self._queue))

  def _take(self, count):
    taken = [self._queue.popleft() for _ in range(max(0, count))]
    host = lambda values: {k: np.asarray(v).tolist() for k, v in values.items()}  # noqa: E731
    return [(step, host(values), mark) for step, values, mark in taken]


class ProgressLine:
  """A bar on a terminal, a plain line every few seconds elsewhere; always on standard error.

  Args:
    total: steps of the whole run.
    done: steps already done.
  """

  def __init__(self, total: int, done: int):
    console = Console(stderr=True)
    self._total, self._first = total, done
    self._start_s = self._last_s = time.perf_counter()
    self._bar = None
    if console.is_terminal:
      self._bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
      )
      self._task = self._bar.add_task("starting", total=total, completed=done)
      self._bar.start()

  def update(self, step: int, text: str):
    """Shows that `step` steps are done, with a line of metrics."""
    if self._bar:
      self._bar.update(self._task, completed=step, description=text)
      return
    now_s = time.perf_counter()
    if now_s - self._last_s >= _EVERY_S or step == self._total:
      self._last_s = now_s
      left_s = (now_s - self._start_s) / max(1, step - self._first) * (self._total - step)
      print(f"step {step}/{self._total}  {text}  {left_s:.0f} s left", file=sys.stderr, flush=True)

  def close(self):
    """Leaves the last state on the screen."""
    if self._bar:
      self._bar.stop()


class NoReport:
  """A `Reporter` that says nothing: that of every process but the writer."""

  def feed(self, batches):
    """Passes batches on."""
    return batches

  def add(self, step: int, values: dict):
    """Drops the values."""

  def record(self, step: int, name: str, call: Callable):
    """Calls what is to be recorded."""
    call()

  def flush(self):
    """Does nothing."""

  close = flush

  def stop(self, step: int):
    """Does nothing."""


class Reporter:
  """Takes each step's device metrics and, a little later, writes and shows them.

  A line of a step has `steps_s`, the seconds of all steps since the line before, and of these
  `tokens_per_s` and the share of the peak. The first step of a session, which is mostly
  compilation, is its `startup_s`; `data_wait_s`, `evaluation_s` and `checkpoint_s` are in none.

  Args:
    workdir: folder of the run.
    steps: steps of the whole run.
    done: steps already done.
    every: steps between lines of metrics.
    flops_per_step: model FLOPs of one step, forward and backward.
    peak: what the rate is a share of.
    clock: tells what time went on.
  """

  def __init__(
    self, workdir, steps, done, every, flops_per_step, peak: Peak, clock: StepClock | None = None
  ):
    self._writer = MetricsWriter(workdir, done)
    self._line = ProgressLine(steps, done)
    self._pending = Pending()
    self._starving = Starving()
    self._every, self._steps, self._first = every, steps, done + 1
    self._flops_per_step, self._peak = flops_per_step, peak
    self._clock = clock or StepClock()
    self._since = np.zeros(3)  # (seconds, tokens, steps) since the last line
    self._whole = np.zeros(3)  # of all lines
    self._other = dict.fromkeys(_OTHER, 0.0)  # seconds beside
    self._wait_s = 0.0  # for batches, since the last line

  def feed(self, batches):
    """Passes batches on, and notes how long each was waited for."""
    return self._clock.feed(batches)

  def add(self, step: int, values: dict):
    """Queues one step's metrics and deals with those that are due."""
    self._show(self._pending.add(step, values, self._clock.mark(values)))

  def _show(self, due):
    for step, values, mark in due:
      took_s, wait_s = self._clock.seconds(mark)
      self._wait_s += wait_s
      tokens = values.pop("tokens")
      if step == self._first:
        values["startup_s"] = self._other["startup"] = took_s
      else:
        self._since += took_s, tokens, 1
      if step % self._every == 0 or step in (self._first, self._steps):
        self._report(step, values)

  def _report(self, step: int, values: dict):
    """Writes and shows one line, of this step's values and the rate since the last line."""
    self._other["data_wait"] += self._wait_s
    self._whole += self._since
    values |= {"data_wait_s": self._wait_s, **self._rates(*self._since)}
    self._since, self._wait_s = np.zeros(3), 0.0
    self._writer.write(step, values)
    for line in self._starving.add(values["moe_load"]) if "moe_load" in values else ():
      print(f"llmjax: warning: step {step}: {line}", file=sys.stderr, flush=True)
    self._line.update(step, f"loss {values['loss']:.3f}  {self._words()}")

  def _rates(self, seconds: float, tokens: float, steps: float) -> dict:
    if not steps:
      return {}
    share = self._flops_per_step * steps / seconds / self._peak.flops
    return {"steps_s": seconds, "tokens_per_s": tokens / seconds, self._peak.key: share}

  def _words(self) -> str:
    """The rate of this session, and what time went on beside its steps."""
    said = []
    if rates := self._rates(*self._whole):
      share = f"{rates[self._peak.key]:.0%} {self._peak.words}"
      said.append(f"{rates['tokens_per_s']:,.0f} tokens/s  {share}")
    beside = [f"{_OTHER[name]} {s:.1f} s" for name, s in self._other.items() if s >= 0.05]
    return "  ".join([*said, *([f"({', '.join(beside)})"] if beside else [])])

  def record(self, step: int, name: str, call: Callable):
    """Calls what is no step, such as an evaluation, after all that is pending, and times it.

    What it returns, if anything, is written with its seconds, as a line of its own.
    """
    self.flush()
    made, took_s = self._clock.spend(call)
    self._other[name] += took_s
    self._writer.write(step, {**(made or {}), f"{name}_s": took_s})

  def flush(self):
    """Deals with all that is pending."""
    self._show(self._pending.flush())

  def close(self):
    """Deals with all that is pending and closes the files."""
    self.stop(self._steps + 1)

  def stop(self, step: int):
    """Deals with what is pending of the steps before `step`, and closes the files."""
    self._show([due for due in self._pending.flush() if due[0] < step])
    self._line.close()
    self._writer.close()
