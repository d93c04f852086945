"""Starting workers and going round them, so that one alone computes at any time."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmjax.bench.peers import Spec
from llmjax.core.errors import UserError

# The worker's `llmjax` is the bare folder: the package's own __init__ imports jax, and a peer's
# memory and start would be charged with that.
_FOLDER = Path(__file__).parent.parent
_BOOT = """
import sys, types
llmjax = types.ModuleType("llmjax")
llmjax.__path__ = [sys.argv[2]]
sys.modules["llmjax"] = llmjax
from llmjax.bench.worker import main
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
