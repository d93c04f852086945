"""How long each step of a run takes, and the peak rate of its devices. Metrics are read some steps
late, several at once: a thread notes when each step's were there."""

import dataclasses
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from llmjax.core.chips import chip_of
from llmjax.core.errors import note


@dataclasses.dataclass(frozen=True)
class Peak:
  """The rate that a run's rate is a share of.

  Attributes:
    flops: FLOP/s of all devices of the run.
    key: name of the share in `metrics.jsonl`: mfu, or matmul_share of a measured rate.
    words: name of the share in the line of progress.
  """

  flops: float
  key: str
  words: str


def peak_of(dtype: str) -> Peak:
  """Finds the peak rate of all devices: a chip's published one, or a measured matmul's."""
  device = jax.devices()[0]
  chip = chip_of(device.device_kind)
  if chip:
    return Peak(chip.peak(dtype) / chip.devices * jax.device_count(), "mfu", "MFU")
  if device.platform != "cpu" and jax.process_index() == 0:
    text = f"no peak of {device.device_kind!r} is known; rates are shares of a measured product"
    note(text, "warning")
  return Peak(matmul_peak_flops(dtype), "matmul_share", "of measured matmul peak")


def matmul_peak_flops(dtype: str) -> float:
  """Measures dense matrix multiplication: FLOP/s over the devices of all processes.

  Args:
    dtype: operands' dtype; sums are in fp32.
  """
  a = jnp.ones((1024, 1024), dtype)
  multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  run = lambda: multiply(a).block_until_ready()  # noqa: E731
  run()  # compiles
  best_s = min(timeit.repeat(run, number=1, repeat=5))
  devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
  # Processes measure at the same time, so those on one machine each find their share of it.
  return 2 * len(a) ** 3 / best_s * devices * jax.process_count()


def _finished(values) -> float:
  jax.block_until_ready(values)
  return time.perf_counter()


class StepClock:
  """Divides a loop's wall clock among its steps and what happens between them.

  A step takes from the end of the one before to its own end, less what `spend` took in between and
  less the time that devices waited for the step's batch.

  Args:
    now: returns the time in seconds.
    finished: waits for a step's values and returns the time when they were there.
  """

  def __init__(
    self, now: Callable[[], float] = time.perf_counter, finished: Callable = _finished
  ):
    self._now, self._finished = now, finished
    self._watch = ThreadPoolExecutor(1, "llmjax-clock")
    self._end_s = self._asked_s = self._given_s = now()
    self._spent_s = 0.0

  def feed(self, batches: Iterator) -> Iterator:
    """Passes batches on and notes when each was asked for and when it came."""
    self._asked_s = self._now()
    for batch in batches:
      self._given_s = self._now()
      yield batch
      self._asked_s = self._now()

  def mark(self, values):
    """Returns a mark of the step just started, whose results are `values`, for `seconds`."""
    return self._asked_s, self._given_s, self._watch.submit(self._finished, values)

  def seconds(self, mark) -> tuple[float, float]:
    """Waits for a marked step: (its seconds, seconds that devices waited for its batch).

    To be called once for each mark, in order.
    """
    asked_s, given_s, end = mark
    wait_s = max(0.0, given_s - max(asked_s, self._end_s))
    step_s = end.result() - self._end_s - self._spent_s - wait_s
    self._end_s, self._spent_s = end.result(), 0.0
    return step_s, wait_s

  def spend(self, call: Callable):
    """Calls what is no step, after `seconds` of all marks: (its result, its seconds)."""
    began_s = self._now()
    result = call()
    took_s = self._now() - began_s
    self._spent_s += took_s
    return result, took_s
