"""Works around a deadlock of XLA's CPU collectives with several devices in one process. Every
collective gets its own channel, and every device enough threads to wait in several at once."""

# XLA's CPU executor orders two collectives only by when they begin, and a loop or a conditional
# counts as begun once it has handed some of its instructions to another thread. A device may
# therefore enter a later collective while its neighbour still waits in one inside the loop. That is
# harmless if collectives have different channels and every waiting one has a thread. But jax gives
# all that are written by hand the same channel, so that two over the same devices are confused, and
# the pool has only as many threads as there are devices or cores, so that all of them can wait for
# one that gets no thread: the run hangs, or fails a check of XLA's. Seen in pipelines, rarely with
# jax 0.10 and often with 0.12.

import functools
import os
import re

from jax.interpreters import mlir

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_THREADS = 8  # per device: this many of its collectives can wait at once


def force_devices(count: int):
  """Splits a CPU into so many devices, unless XLA_FLAGS already says how many.

  Raises the time that devices, which share the CPU's cores, may wait for each other. Has an effect
  only before jax initializes its devices, and none on accelerators.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  for flag, value in (
    ("xla_force_host_platform_device_count", count),
    ("xla_cpu_collective_call_terminate_timeout_seconds", 600),
  ):
    if flag not in flags:
      flags += f" --{flag}={value}"
  os.environ["XLA_FLAGS"] = flags.strip()
  reserve_threads()


def reserve_threads():
  """Asks for enough threads if XLA_FLAGS split a CPU into several devices.

  Has an effect only before jax initializes its devices; PJRT_NPROC takes precedence.
  """
  found = _COUNT.findall(os.environ.get("XLA_FLAGS", ""))
  if found and int(found[-1]) > 1:
    os.environ.setdefault("PJRT_NPROC", str(_THREADS * int(found[-1])))


@functools.cache
def separate_channels():
  """Gives every collective that is lowered for CPUs from now on its own channel."""
  from jax._src.interpreters import mlir as rules  # the lowering rules have no public name
  from jax._src.lax import parallel

  collectives = (
    parallel.all_gather_p, parallel.all_to_all_p, parallel.pmax_p, parallel.pmin_p,
    parallel.ppermute_p, parallel.psum_p, parallel.reduce_scatter_p,
  )
  for primitive in collectives:
    rule = rules._lowerings[primitive].rule
    lower = functools.partial(_lower, rules, rule)
    mlir.register_lowering(primitive, lower, platform="cpu", cacheable=False)


def _lower(rules, rule, context, *arguments, **parameters):
  """Lowers one collective; its rule reads the channel from a constant of the module."""
  shared, rules.COLLECTIVE_CHANNEL_ID = (
    rules.COLLECTIVE_CHANNEL_ID, context.module_context.new_channel()
  )
  try:
    return rule(context, *arguments, **parameters)
  finally:
    rules.COLLECTIVE_CHANNEL_ID = shared


reserve_threads()
