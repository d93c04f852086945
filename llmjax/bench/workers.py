"""Competitors: their table, a process for each of them, and rounds in which one alone computes.

A worker prepares (that includes a first step), answers with one JSON line, and then answers every
line of standard input, a JSON request, with one measured round. In between it uses no core.
"""

import contextlib
import dataclasses
import importlib.util
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

from llmjax.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Peer:
  """One competitor.

  Attributes:
    where: `module:function`; the function takes a `Spec` and returns (facts, measure).
    needs: importable packages without which it is left out.
    kind: what is added to the size's name: "-moe" or nothing.
  """

  where: str
  needs: tuple[str, ...] = ()
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a worker is to prepare.

  Attributes:
    where: the peer's function, as in `Peer`.
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


_TORCH = ("torch", "transformers")

PEERS = {
  "train": {
    "llmjax": Peer("llmjax.bench.ours:train"),
    "transformers": Peer("llmjax.bench.torch_peers:train", _TORCH),
    "transformers-compile": Peer("llmjax.bench.torch_peers:train_compiled", _TORCH),
    "litgpt": Peer("llmjax.bench.torch_peers:train_litgpt", (*_TORCH, "litgpt", "lightning")),
  },
  "moe": {
    "llmjax": Peer("llmjax.bench.ours:train", kind="-moe"),
    "dense": Peer("llmjax.bench.ours:train"),
    "transformers": Peer("llmjax.bench.torch_peers:train", _TORCH, "-moe"),
  },
  "decode": {
    "llmjax": Peer("llmjax.bench.ours:decode"),
    "transformers": Peer("llmjax.bench.torch_peers:decode", _TORCH),
    "transformers-static": Peer("llmjax.bench.torch_peers:decode_static", _TORCH),
    "llama.cpp": Peer("llmjax.bench.ggml:decode", ("llama_cpp", "gguf")),
  },
  "data": {
    "step": Peer("llmjax.bench.ours:train"),
    "tokenize": Peer("llmjax.bench.ours:tokenize"),
    "load": Peer("llmjax.bench.ours:load"),
  },
}


def pick(bench: str, names: Sequence[str] = ()) -> dict[str, Peer]:
  """Chooses peers by name and leaves out, with a line on standard error, what is not installed.

  Args:
    bench: a key of `PEERS`.
    names: peers wanted; all by default.
  Raises:
    UserError: a name is unknown.
  """
  known = PEERS[bench]
  for name in names:
    if name not in known:
      raise UserError(f"unknown peer {name!r} of bench {bench}; {nearest(name, known)}")
  chosen = {}
  for name in [name for name in known if not names or name in names]:
    missing = [package for package in known[name].needs if not importlib.util.find_spec(package)]
    if missing:
      install = "see requirements-bench.txt: pip install --no-deps -r requirements-bench.txt"
      why = f"{missing[0]} is not installed; {install}"
      print(f"llmjax: {name} is left out, {why}", file=sys.stderr)
    else:
      chosen[name] = known[name]
  return chosen


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


class WorkerError(UserError):
  """A worker died (most often its packages do not fit together); its last words are the message."""


class Worker:
  """A running competitor.

  Args:
    name: for messages.
    environment: variables set on top of this process's.
  Attributes:
    facts: what it said when it was ready.
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
    # A worker that died is told by `_answer`, with its own last words.
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    status = self._process.wait()
    self._log.seek(0)
    said = [line.strip() for line in self._log if line.strip()] or ["(it wrote nothing)"]
    raise WorkerError(f"{self.name} ended with status {status}: {said[-1]}")

  def close(self) -> None:
    """Ends the process by ending its input, or by force when that does not do."""
    with self._log:
      try:
        self._process.communicate(timeout=10)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.communicate()


def interleave(
  workers: Mapping[str, Worker], requests: Mapping[str, Sequence[dict]], rounds: int
) -> dict[str, list[list[dict]]]:
  """Asks every worker in turn, `rounds` times, every other round in reverse order.

  Args:
    requests: what a round asks of each worker, by its name.
  Returns:
    By worker, for each of its requests, one answer a round.
  """
  made = {name: [[] for _ in requests[name]] for name in workers}
  for number in range(rounds):
    for name in list(workers)[:: -1 if number % 2 else 1]:
      say(f"round {number + 1} of {rounds}: {name}")
      for answers, request in zip(made[name], requests[name], strict=True):
        answers.append(workers[name].ask(request))
  return made


def say(text: str) -> None:
  """Tells how far a benchmark is, on standard error."""
  print(text, file=sys.stderr, flush=True)


_STATUS = Path("/proc/self/status")


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
