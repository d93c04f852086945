"""Competitors as processes: one for each, of which only one computes at a time.

A worker prepares (that includes a first step), answers with one JSON line, and then answers every
line of standard input, a JSON request, with one measured round. In between it uses no core.
"""

import contextlib
import dataclasses
import json
import os
import pkgutil
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmjax.core.errors import UserError

# The worker's `llmjax` is the bare folder: the package's own __init__ imports jax, and a peer's
# memory and start would be charged with that.
_FOLDER = Path(__file__).parent.parent
_BOOT = """
import sys, types
llmjax = types.ModuleType("llmjax")
llmjax.__path__ = [sys.argv[2]]
sys.modules["llmjax"] = llmjax
from llmjax.bench.workers import main
main()
"""
_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a worker is to prepare.

  Attributes:
    where: `module:function`; the function takes this spec and returns (facts, measure).
    size: a name of `sizes.SIZES`.
    dtype: compute dtype, float32 or bfloat16.
    folder: the weights, and a place for files of the run.
    cores: threads to use.
    overrides: `--config.a.b=v` arguments for llmjax.
  """

  where: str
  size: str
  dtype: str
  folder: str
  cores: int
  overrides: tuple[str, ...] = ()


class WorkerError(UserError):
  """A worker died (most often its packages do not fit together); the message ends with its own."""


class Worker:
  """A running competitor.

  Args:
    name: for messages.
    environment: variables set on top of this process's.
  Attributes:
    facts: its answer when it was ready.
  """

  def __init__(self, name: str, spec: Spec, environment: Mapping[str, str]):
    self.name = name
    self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 closed in close()
    self._process = subprocess.Popen(
      [sys.executable, "-c", _BOOT, json.dumps(dataclasses.asdict(spec)), str(_FOLDER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env={**os.environ, "OMP_NUM_THREADS": str(spec.cores), **environment},
    )
    try:
      self.facts = self._answer()
    except BaseException:
      self.close()
      raise

  def ask(self, request: dict) -> dict:
    """Sends one request and waits for the answer."""
    with contextlib.suppress(BrokenPipeError):  # of a worker that died, `_answer` says why
      print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    status = self._process.wait()
    self._log.seek(0)
    lines = [line.strip() for line in self._log if line.strip()] or ["(it wrote nothing)"]
    raise WorkerError(f"{self.name} ended with status {status}: {lines[-1]}")

  def close(self) -> None:
    """Ends the process by ending its input, or by force when that does not do."""
    with self._log:
      try:
        self._process.communicate(timeout=10)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.communicate()


def interleave(
  workers: Mapping[str, Worker], requests: Sequence[dict], rounds: int
) -> dict[str, list[list[dict]]]:
  """Asks every worker in turn, `rounds` times, every other round in reverse order.

  Returns:
    By worker, for each request, one answer a round.
  """
  answers = {name: [[] for _ in requests] for name in workers}
  for number in range(rounds):
    for name in list(workers)[:: -1 if number % 2 else 1]:
      print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
      for before, request in zip(answers[name], requests, strict=True):
        before.append(workers[name].ask(request))
  return answers


def peak_bytes() -> int:
  """Reads this process's largest resident memory.

  Linux's `ru_maxrss` outlives `exec`, so a small child shows its parent's peak; `VmHWM` does not.
  """
  if _STATUS.exists():
    return int(re.search(r"^VmHWM:\s*(\d+)", _STATUS.read_text(), re.M)[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, which counts bytes


def main() -> None:
  """Serves the spec of the command line over standard input and output."""
  out = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # a library that prints must not speak in between
  spec = Spec(**json.loads(sys.argv[1]))
  began_s = time.perf_counter()
  prepare = pkgutil.resolve_name(spec.where)
  imported_s = time.perf_counter()
  facts, measure = prepare(spec)
  times = {"import_s": imported_s - began_s, "first_step_s": time.perf_counter() - imported_s}
  print(json.dumps({**times, **facts, "start_peak_bytes": peak_bytes()}), file=out)
  with contextlib.suppress(OSError):  # where the kernel allows it, the peak is that of the steps
    Path("/proc/self/clear_refs").write_text("5")
  for line in sys.stdin:
    print(json.dumps({**measure(json.loads(line)), "peak_bytes": peak_bytes()}), file=out)
