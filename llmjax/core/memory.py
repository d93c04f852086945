"""Settings of the C allocator for XLA's buffers, which are few, large and allocated every step. By
default glibc maps and unmaps each, so that every CPU step zeroes all pages again (a sixth of a
small step), and compiling leaves hundreds of megabytes of freed pages unreturned."""

import ctypes
import os
import time

import jax
import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_S = 1.0  # shorter compilations free little, and trimming takes tens of milliseconds
# (parameter, value) for mallopt(3): no mmap for large buffers (-4), never trim (-1), and one heap
# for all threads (-8), since a thread's own heap cannot hold a large buffer.
_KEEP = ((-4, 0), (-1, -1), (-8, 1))
_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which a user decides instead
_FREED_S = 0.001  # XLA nearly always frees within 0.5 ms of its results being ready


def tune_allocator() -> bool:
  """Keeps freed memory for the next step, and trims it after every long compilation.

  Returns:
    Whether the C library is glibc; others are left alone.
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
  """Returns freed pages to the operating system."""
  library = _glibc()
  if library is not None:
    library.malloc_trim(0)


def settle(results) -> None:
  """Waits on CPU until a step has finished and freed its temporaries; does nothing elsewhere.

  A step that starts earlier would get memory of its own, and keep it.
  """
  if jax.default_backend() == "cpu":
    jax.block_until_ready(results)
    time.sleep(_FREED_S)


def _glibc():
  try:
    library = ctypes.CDLL(None)
  except OSError:
    return None
  return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
