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

  def __init__(self, name: str, spec: Spec, environment: Mapping[str, str] | None = None):
    self.name = name
    self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 closed in close()
    self._process = subprocess.Popen(
      [sys.executable, "-c", _BOOT, json.dumps(dataclasses.asdict(spec)), str(_FOLDER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env={**os.environ, "OMP_NUM_THREADS": str(spec.cores), **(environment or {})},
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
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
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
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._log.close()


def interleave(
  workers: Mapping[str, Worker], requests: Mapping[str, Sequence[dict]], rounds: int, tell=None
) -> dict[str, list[list[dict]]]:
  """Asks every worker in turn, `rounds` times, every other round in reverse order.

  Args:
    requests: what a round asks of each worker, by its name.
    tell: called with the round's number and a worker's name before it is asked.
  Returns:
    By worker, for each of its requests, one answer a round.
  """
  made = {name: [[] for _ in requests[name]] for name in workers}
  for number in range(rounds):
    order = list(workers)[:: -1 if number % 2 else 1]
    for name in order:
      if tell:
        tell(number, name)
      for place, request in enumerate(requests[name]):
        made[name][place].append(workers[name].ask(request))
  return made
