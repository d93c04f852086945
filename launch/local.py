"""`launch --on=local:N`: runs `llmjax train` in N processes with CPU devices on this machine."""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.watch import Watched
from llmjax.core.errors import UserError
from llmjax.parallel import join


def launch(
  config: str, workdir: str, processes: int, devices: int = 1, overrides: Sequence[str] = ()
) -> dict:
  """Runs or resumes an experiment in several processes on this machine.

  Args:
    config: Python file of the experiment.
    workdir: folder of the run.
    processes: number of processes.
    devices: number of CPU devices per process.
    overrides: `--config.a.b=v` arguments.
  Returns:
    The content of the run's `result.json`.
  Raises:
    UserError: the input was wrong.
    RunFailed: a process died; the message says which one and how.
    KeyboardInterrupt: SIGINT or SIGTERM; the processes saved a checkpoint and stopped.
  """
  if processes < 1 or devices < 1:
    raise UserError(f"{processes} processes with {devices} devices each; both are at least 1")
  command = [sys.executable, "-m", "llmjax", "train", f"--config={config}", f"--workdir={workdir}"]
  run = Watched([*command, *overrides], _environments(processes, devices))
  before = {number: signal.signal(number, run.stop) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    run.watch()
  finally:
    run.signal(signal.SIGKILL)
    for number, handler in before.items():
      signal.signal(number, handler)
  run.verdict()
  return json.loads(Path(workdir, "result.json").read_text())


def _environments(processes: int, devices: int) -> list[dict[str, str]]:
  """The environment of each process: how to join the others, and its CPU devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  count = "--xla_force_host_platform_device_count"
  flags = re.sub(rf"{count}=\d+", "", os.environ.get("XLA_FLAGS", ""))
  shared = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_BIND_ADDRESS": address,  # by default it would listen to other machines
    "XLA_FLAGS": f"{flags} {count}={devices}".strip(),
    join.COORDINATOR: address,
    join.PROCESSES: str(processes),
    join.LAUNCHER: str(os.getpid()),
  }
  return [{**shared, join.PROCESS: str(number)} for number in range(processes)]
