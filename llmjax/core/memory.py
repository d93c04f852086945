"""Memory that compilers leave behind is given back to the system.

Compiling one training step for CPU leaves hundreds of megabytes of freed pages in the allocator's
arenas, which count as the process's own and which nothing else can use.
"""

import ctypes

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_S = 1.0  # shorter compilations leave little, and giving back takes tens of milliseconds


def give_back_after_compiling() -> bool:
  """Has free pages returned after every long compilation; where the C library cannot, does nothing.

  Returns:
    Whether this C library can (glibc).
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (OSError, AttributeError):
    return False

  def listen(event: str, duration_s: float, **_):
    if event == _COMPILED and duration_s > _LONG_S:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return True
