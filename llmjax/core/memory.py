"""How the C library's allocator treats XLA's buffers, which are few, large, and come every step.

Left alone, glibc asks the system for every large buffer and returns it: each step of a CPU run then
has all its pages zeroed anew, a sixth of a small step's time. And compiling one training step
leaves hundreds of megabytes of freed pages that count as the process's own.
"""

import ctypes
import os
import time

import jax
import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_S = 1.0  # shorter compilations leave little, and giving back takes tens of milliseconds
# (parameter of mallopt(3), value): no mappings of their own, freed pages stay, one heap for all
# threads, since that of a thread cannot hold a large buffer.
_KEEP = ((-4, 0), (-1, -1), (-8, 1))
_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES")  # what a user sets decides
_FREED_S = 0.001  # after its results are ready XLA frees within 0.5 ms, nearly always


def tune_allocator() -> bool:
  """Has freed memory kept for the next step, and given back after every long compilation.

  Returns:
    Whether this C library can (glibc); others are left alone.
  """
  library = _glibc()
  if library is None:
    return False
  if not any(name.startswith(_ENVIRONMENT) for name in os.environ):
    for parameter, value in _KEEP:
      library.mallopt(parameter, value)

  def listen(event: str, duration_s: float, **_):
    if event == _COMPILED and duration_s > _LONG_S:
      give_back()

  jax.monitoring.register_event_duration_secs_listener(listen)
  return True


def give_back() -> None:
  """Returns freed pages to the system, as after work that will not come again soon."""
  library = _glibc()
  if library is not None:
    library.malloc_trim(0)


def settle(results) -> None:
  """Waits on CPU until a step is over and has freed what it needed on the way.

  A step that began before would get memory of its own, and keep it. Other platforms do not wait.

  Args:
    results: of the step.
  """
  if jax.default_backend() == "cpu":
    jax.block_until_ready(results)
    time.sleep(_FREED_S)


def _glibc():
  """The C library, where it is one that can be told; None elsewhere."""
  try:
    library = ctypes.CDLL(None)
  except OSError:
    return None
  return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
