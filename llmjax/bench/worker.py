"""One competitor in a process of its own, started by `harness.Worker`.

The spec is JSON. The worker prepares (that includes a first step), answers with one JSON line, and
then answers every line of standard input, a JSON request, with one measured round. Between rounds
it waits for input and uses no core. What libraries print goes to standard error.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

from llmjax.bench.peers import Spec

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
  """Reads this process's largest resident memory.

  Linux's `ru_maxrss` outlives `exec`, so a small child shows its parent's peak; `VmHWM` does not.
  """
  if _STATUS.exists():
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
  """Forgets the peak so far, where the kernel allows it: then the peak is that of the steps."""
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def serve(spec: Spec, requests, answer) -> None:
  """Prepares the peer of `spec`, then calls `answer` for each of the requests, lines of JSON."""
  module, function = spec.where.split(":")
  began_s = time.perf_counter()
  prepare = getattr(importlib.import_module(module), function)
  imported_s = time.perf_counter()
  facts, measure = prepare(spec)
  first_step_s = time.perf_counter() - imported_s
  times = {"import_s": imported_s - began_s, "first_step_s": first_step_s}
  answer({**times, **facts, "start_peak_bytes": peak_bytes()})
  reset_peak()
  for line in requests:
    answer({**measure(json.loads(line)), "peak_bytes": peak_bytes()})


def main() -> None:
  """Serves the spec of the command line over standard input and output."""
  out = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # a library that prints must not speak in between
  spec = Spec(**json.loads(sys.argv[1]))
  serve(spec, sys.stdin, lambda made: print(json.dumps(made), file=out))
