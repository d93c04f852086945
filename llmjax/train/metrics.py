"""Metrics: metrics.jsonl, TensorBoard and the progress line, fed one step late so nothing waits."""

import json
import sys
import time
import timeit
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmjax.core.files import replace, to_json
from llmjax.train.experts import Starving

_EVERY_S = 10.0  # between plain lines of progress


def matmul_peak_flops(dtype: str) -> float:
  """Measures this machine's dense matrix multiplication: the best of a few of two squares.

  Args:
    dtype: operands' dtype; sums are in fp32.
  Returns:
    FLOP/s over the devices of all processes.
  """
  a = jnp.ones((1024, 1024), dtype)
  multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  run = lambda: multiply(a).block_until_ready()  # noqa: E731
  run()  # compiles
  best_s = min(timeit.repeat(run, number=1, repeat=5))
  devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
  # Processes measure at the same time, so those on one machine each find their share of it.
  return 2 * len(a) ** 3 / best_s * devices * jax.process_count()


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


class Pending:
  """Metrics still on the device, taken off only when `depth` later steps are under way."""

  def __init__(self, depth: int = 2):
    self._depth = depth
    self._queue = deque()

  def add(self, step: int, values):
    """Queues a step's device values; returns the (step, host values) that are due."""
    self._queue.append((step, values))
    return self._take(len(self._queue) - self._depth)

  def flush(self):
    """Returns everything queued, waiting for it."""
    return self._take(len(self._queue))

  def _take(self, count):
    taken = [self._queue.popleft() for _ in range(max(0, count))]
    host = lambda values: {k: np.asarray(v).tolist() for k, v in values.items()}  # noqa: E731
    return [(step, host(values)) for step, values in taken]


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

  def add(self, step: int, values: dict):
    """Drops the values."""

  write = add

  def flush(self):
    """Does nothing."""

  close = flush


class Reporter:
  """Takes each step's device metrics and, a little later, writes and shows them.

  Args:
    workdir: folder of the run.
    steps: steps of the whole run.
    done: steps already done.
    every: steps between lines of metrics.
    flops_per_token: model FLOPs of one trained token, forward and backward.
    peak_flops: FLOP/s that `utilization` is a share of.
  """

  def __init__(self, workdir, steps, done, every, flops_per_token, peak_flops):
    self._writer = MetricsWriter(workdir, done)
    self._line = ProgressLine(steps, done)
    self._pending = Pending()
    self._starving = Starving()
    self._every, self._steps, self._first = every, steps, done + 1
    self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
    self._seen_s = time.perf_counter()
    self._since = np.zeros(2)  # (seconds, tokens) since the last line
    self._whole = np.zeros(2)  # of all lines but the first step's, which is mostly compilation

  def add(self, step: int, values: dict):
    """Queues one step's metrics and deals with those that are due."""
    self._show(self._pending.add(step, values))

  def _show(self, due):
    # Several steps read at once have taken the same time each, as far as can be told from here.
    share_s = (time.perf_counter() - self._seen_s) / max(1, len(due))
    for step, values in due:
      self._seen_s += share_s
      self._since += share_s, values.pop("tokens")
      if step % self._every == 0 or step in (self._first, self._steps):
        self._report(step, values)

  def _report(self, step: int, values: dict):
    """Writes and shows one line, of this step's values and the rate since the last line."""
    took_s, tokens = self._since
    if step != self._first:
      self._whole += self._since
    self._since = np.zeros(2)
    values["tokens_per_s"] = tokens / took_s
    values["utilization"] = self._utilization(tokens / took_s)
    self._writer.write(step, values)
    for line in self._starving.add(values["moe_load"]) if "moe_load" in values else ():
      print(f"llmjax: warning: step {step}: {line}", file=sys.stderr, flush=True)
    whole_s, whole_tokens = self._whole
    rate = whole_tokens / whole_s if whole_s else tokens / took_s
    self._line.update(
      step,
      f"loss {values['loss']:.3f}  {rate:,.0f} tokens/s  "
      f"{self._utilization(rate):.0%} of matmul peak",
    )

  def _utilization(self, tokens_per_s: float) -> float:
    """Share of the machine's measured matrix-multiply peak that a rate amounts to."""
    return tokens_per_s * self._flops_per_token / self._peak_flops

  def write(self, step: int, values: dict):
    """Writes values that are no step's own, such as an evaluation, after all that is pending."""
    self.flush()
    self._writer.write(step, values)
    self._seen_s = time.perf_counter()

  def flush(self):
    """Deals with all that is pending."""
    self._show(self._pending.flush())

  def close(self):
    """Deals with all that is pending and closes the files."""
    self.flush()
    self._line.close()
    self._writer.close()
