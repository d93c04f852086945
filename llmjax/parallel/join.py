"""Joins the processes of a run by three environment variables, and ends them when one fails. A
launcher sets the variables, or a user on each machine."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import traceback

import jax

from llmjax.core.errors import RunFailed, UserError
from llmjax.parallel import multihost

COORDINATOR = "LLMJAX_COORDINATOR"  # host:port where process 0 listens
PROCESS = "LLMJAX_PROCESS"  # this process's number
PROCESSES = "LLMJAX_PROCESSES"  # how many there are
LAUNCHER = "LLMJAX_LAUNCHER"  # optional: process id of the launcher, with which this process ends
GRACE_S = 4  # wait for the other processes, which may have failed for the same reason
HEARTBEAT_S = 20  # a process silent for so long is taken for dead, and the others end


def join() -> None:
  """Joins the processes that the environment names, if any; must run before jax is initialized.

  CPU devices communicate through gloo.

  Raises:
    UserError: some of the three variables are missing or not valid numbers.
  """
  given = {name: os.environ.get(name, "") for name in (COORDINATOR, PROCESS, PROCESSES)}
  if not any(given.values()) or jax.distributed.is_initialized():
    return
  address, *numbers = given.values()
  if not address or not all(number.isdecimal() for number in numbers):
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    raise UserError(f"the environment has {shown}; expected are host:port and two numbers")
  process, count = map(int, numbers)
  if process >= count:
    raise UserError(f"{PROCESS}={process} is not below {PROCESSES}={count}")
  _end_with_launcher()
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the loop
  jax.distributed.initialize(
    address, count, process,
    cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_S,
  )


def _end_with_launcher():
  parent = os.environ.get(LAUNCHER)
  if parent and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
      raise SystemExit(1)


def leave(status: int) -> int:
  """Ends a failed process without waiting for others, which may be waiting for it.

  Returns:
    `status`, if this is the only process; the caller then handles the current exception.
  """
  if not jax.distributed.is_initialized():
    return status
  error = sys.exc_info()[1]
  if isinstance(error, RunFailed) and multihost.all_here(GRACE_S):
    return status
  with contextlib.suppress(OSError):  # the reader of our output may be gone
    text = " ".join(str(error).split())
    silent = silent_process(text)
    if isinstance(error, Exception) and (silent or _GONE.search(text)):
      which = f"process {silent}" if silent else "another process"
      print(f"llmjax: process {jax.process_index()} lost {which}: {text[:200]}", file=sys.stderr)
    elif not isinstance(error, (UserError, RunFailed, KeyboardInterrupt)):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


_SILENT = re.compile(r"stopped sending heartbeats\):\s*(\d+)|Task (\d+) heartbeat timeout")
_GONE = re.compile(r"Gloo \w+ failed|Connection (closed|reset) by peer")


def silent_process(text: str) -> str:
  """Finds which process an error of jax's runtime no longer hears from; empty if none."""
  if found := _SILENT.search(text):
    return found[1] or found[2]
  return "0" if "CoordinationService/Heartbeat" in text else ""  # process 0 monitors the heartbeats
