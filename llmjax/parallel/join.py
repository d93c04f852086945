"""How the processes of a run find each other, and how they leave when one of them fails.

Whoever starts them, a launcher or a user on each machine, sets three variables in the environment.
"""

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
LAUNCHER = "LLMJAX_LAUNCHER"  # optional: id of the parent, without which the process ends
GRACE_S = 4  # that processes wait for each other which may all have failed of the same
HEARTBEAT_S = 20  # a process not heard of for so long is dead, and the others end


def join() -> None:
  """Joins the processes that the environment names, CPU devices through gloo; else does nothing.

  Comes before anything touches a device.

  Raises:
    UserError: some of the three variables are missing, or are no such numbers.
  """
  given = {name: os.environ.get(name, "") for name in (COORDINATOR, PROCESS, PROCESSES)}
  if not any(given.values()) or jax.distributed.is_initialized():
    return
  address, *numbers = given.values()
  if not address or not all(number.isdecimal() for number in numbers):
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    raise UserError(f"the environment has {shown}; wanted are host:port and two numbers")
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
  """Has Linux kill us when the launcher is gone: nobody would see an orphaned run, nor stop it."""
  parent = os.environ.get(LAUNCHER)
  if parent and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
      raise SystemExit(1)


def leave(status: int) -> int:
  """Ends a process that failed, without waiting for others who may be waiting for it.

  Returns:
    `status`, where this process is alone; an exception being handled is then the caller's.
  """
  if not jax.distributed.is_initialized():
    return status
  error = sys.exc_info()[1]
  if isinstance(error, RunFailed) and multihost.all_here(GRACE_S):
    return status
  with contextlib.suppress(OSError):  # whoever read our output may be gone
    text = " ".join(str(error).split())
    if isinstance(error, Exception) and (lost(text) or _GONE.search(text)):
      which = f"process {lost(text)}" if lost(text) else "another process"
      print(f"llmjax: process {jax.process_index()} lost {which}: {text[:200]}", file=sys.stderr)
    elif not isinstance(error, (UserError, RunFailed, KeyboardInterrupt)):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


_SILENT = re.compile(r"stopped sending heartbeats\):\s*(\d+)|Task (\d+) heartbeat timeout")
_GONE = re.compile(r"Gloo \w+ failed|Connection (closed|reset) by peer")


def lost(text: str) -> str:
  """Reads in what jax's runtime says which process it no longer hears; empty if it says none."""
  if found := _SILENT.search(text):
    return found[1] or found[2]
  return "0" if "CoordinationService/Heartbeat" in text else ""  # it is process 0 who counts them
