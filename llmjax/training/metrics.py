"""Metrics: metrics.jsonl, TensorBoard and the progress line, fed some steps late: no step waits."""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmjax.core.errors import note
from llmjax.core.files import replace, to_json
from llmjax.core.progress import ProgressLine
from llmjax.training.experts import Starving
from llmjax.training.rates import Peak, StepClock

# What a run spends time on beside its steps: name in `metrics.jsonl`, without `_s` → in words.
BESIDE = {
  "startup": "start-up", "data_wait": "data", "evaluation": "evaluation",
  "checkpoint": "checkpoints",
}


class MetricsWriter:
  """Appends metrics to `metrics.jsonl` and TensorBoard, one object a line, in step order.

  Args:
    workdir: folder of the run.
    step: steps already done; lines of later steps, which a resumed run repeats, are dropped.
  """

  def __init__(self, workdir: Path, step: int):
    path = Path(workdir, "metrics.jsonl")
    kept = [line for line in read_metrics(workdir) if line["step"] <= step]
    replace(path, "".join(to_json(line) + "\n" for line in kept))
    self._file = path.open("a", buffering=1)
    from tensorboardX import SummaryWriter  # here, because it imports torch wherever there is one

    self._board = SummaryWriter(str(Path(workdir, "tensorboard")), purge_step=step + 1)

  def write(self, step: int, values: dict):
    self._file.write(to_json({"step": step, **values}) + "\n")
    for name, value in values.items():
      if not isinstance(value, list):  # one of each layer or expert is for metrics.jsonl alone
        self._board.add_scalar(name, value, step)

  def close(self):
    self._file.close()
    self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
  """Reads a run's `metrics.jsonl`, without a last line that was cut short."""
  path = Path(workdir, "metrics.jsonl")
  out = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return out


def rates(workdir: Path) -> dict:
  """Sums the times in `metrics.jsonl` over all sessions of a run.

  Returns:
    `steps_s`, `startup_s`, `data_wait_s`, `evaluation_s`, `checkpoint_s`; averages over `steps_s`:
    `tokens_per_s`, None if no session got beyond its first step, and `mfu` or `matmul_share`.
  """
  lines = read_metrics(workdir)
  total = {f"{name}_s": sum(line.get(f"{name}_s", 0.0) for line in lines) for name in BESIDE}
  timed = [line for line in lines if "steps_s" in line]
  steps_s = sum(line["steps_s"] for line in timed)
  out = {"tokens_per_s": None, "steps_s": steps_s, **total}
  for key in ("tokens_per_s", "mfu", "matmul_share"):
    if values := [line[key] * line["steps_s"] for line in timed if key in line]:
      out[key] = sum(values) / sum(line["steps_s"] for line in timed if key in line)
  return {key: value and round(value, 6) for key, value in out.items()}


class Pending:
  """Metrics still on the device, fetched only when two later steps are under way."""

  def __init__(self):
    self._queue = deque()

  def add(self, step: int, values, mark=None):
    """Queues a step's device values; returns the (step, host values, mark) that are due."""
    self._queue.append((step, values, mark))
    return self._take(len(self._queue) - 2)

  def flush(self):
    """Waits for all that is queued and returns it."""
    return self._take(len(self._queue))

  def _take(self, count):
    taken = [self._queue.popleft() for _ in range(max(0, count))]
    host = lambda values: {k: np.asarray(v).tolist() for k, v in values.items()}  # noqa: E731
    return [(step, host(values), mark) for step, values, mark in taken]


class NoReport:
  """A `Reporter` that reports nothing: that of every process but the writer."""

  def feed(self, batches):
    return batches

  def record(self, step: int, name: str, call: Callable):
    call()

  def add(self, *_):
    pass

  close = stop = add


class Reporter:
  """Takes each step's device metrics and, a little later, writes and shows them.

  A line has `steps_s`, the seconds of all steps since the line before, and averages over these:
  `tokens_per_s` and the share of the peak. The first step of a session, which is mostly
  compilation, is its `startup_s`. `data_wait_s`, `evaluation_s` and `checkpoint_s` are not part of
  `steps_s`.

  Args:
    workdir: folder of the run.
    steps: steps of the run.
    done: steps already done.
    every: steps between lines of metrics.
    flops_per_step: model FLOPs of one step, forward and backward.
    peak: the rate that the run's is a share of.
    clock: measures each step.
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
    self._since_line = np.zeros(3)  # seconds, tokens, steps
    self._session = np.zeros(3)
    self._beside = dict.fromkeys(BESIDE, 0.0)  # seconds of the session
    self._wait_s = 0.0  # for batches, since the last line

  def feed(self, batches):
    """Passes batches on and measures how long each was waited for."""
    return self._clock.feed(batches)

  def add(self, step: int, values: dict):
    """Queues one step's metrics and reports those that are due."""
    self._show(self._pending.add(step, values, self._clock.mark(values)))

  def _show(self, due):
    for step, values, mark in due:
      took_s, wait_s = self._clock.seconds(mark)
      self._wait_s += wait_s
      tokens = values.pop("tokens")
      if step == self._first:
        values["startup_s"] = self._beside["startup"] = took_s
      else:
        self._since_line += took_s, tokens, 1
      if step % self._every == 0 or step in (self._first, self._steps):
        self._report(step, values)

  def _report(self, step: int, values: dict):
    self._beside["data_wait"] += self._wait_s
    self._session += self._since_line
    values |= {"data_wait_s": self._wait_s, **self._rates(*self._since_line)}
    self._since_line, self._wait_s = np.zeros(3), 0.0
    self._writer.write(step, values)
    for line in self._starving.add(values["moe_load"]) if "moe_load" in values else ():
      note(f"step {step}: {line}", "warning")
    self._line.update(step, f"loss {values['loss']:.3f}  {self._words()}")

  def _rates(self, seconds: float, tokens: float, steps: float) -> dict:
    if not steps:
      return {}
    share = self._flops_per_step * steps / seconds / self._peak.flops
    return {"steps_s": seconds, "tokens_per_s": tokens / seconds, self._peak.key: share}

  def _words(self) -> str:
    words = []
    if rates := self._rates(*self._session):
      share = f"{rates[self._peak.key]:.0%} {self._peak.words}"
      words.append(f"{rates['tokens_per_s']:,.0f} tokens/s  {share}")
    if beside := [f"{BESIDE[name]} {s:.1f} s" for name, s in self._beside.items() if s >= 0.05]:
      words.append(f"({', '.join(beside)})")
    return "  ".join(words)

  def record(self, step: int, name: str, call: Callable):
    """Reports all that is pending, then calls and times what is no step, such as an evaluation.

    The values it returns, if any, and its seconds are a line of their own.
    """
    self._show(self._pending.flush())
    values, took_s = self._clock.spend(call)
    self._beside[name] += took_s
    self._writer.write(step, {**(values or {}), f"{name}_s": took_s})

  def close(self):
    """Reports all that is pending and closes the files."""
    self.stop(self._steps + 1)

  def stop(self, step: int):
    """Reports what is pending of the steps before `step`, and closes the files."""
    self._show([due for due in self._pending.flush() if due[0] < step])
    self._line.close()
    self._writer.close()
