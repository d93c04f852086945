"""One competitor in a process of its own, started by `harness.Worker`.

The spec is JSON. The worker prepares (that includes a first step), answers with one JSON line, and
then answers every line of standard input, a JSON request, with one measured round. Between rounds
it waits for input and uses no core. What libraries print goes to standard error.
"""

import contextlib
import json
import os
import pkgutil
import re
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
