"""Collectives of several CPU devices in one process: told apart by their channels, with threads.

XLA's CPU executor orders two collectives only by when they begin, and a loop or a conditional
counts as begun as soon as it has handed some of its instructions to another thread. A device may
therefore enter a later collective while its neighbour still waits in one inside the loop. That is
harmless where collectives can be told apart and every waiting one has a thread. jax gives all that
are written by hand the same channel, so that two of the same devices are taken for one another, and
the pool has as many threads as there are devices or cores, so that all can wait for one that finds
no thread: a run then stands still, or ends in a failed check of XLA's. Seen in pipelines, rarely
with jax 0.10 and often with 0.12.
"""

import functools
import os
import re

from jax.interpreters import mlir

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_THREADS = 8  # a device; as many collectives of one device may wait at once


def reserve_threads():
  """Asks for enough threads where XLA_FLAGS make a CPU act as several devices.

  It counts only before jax makes its devices; PJRT_NPROC in the environment has the last word.
  """
  found = _COUNT.findall(os.environ.get("XLA_FLAGS", ""))
  if found and int(found[-1]) > 1:
    os.environ.setdefault("PJRT_NPROC", str(_THREADS * int(found[-1])))


@functools.cache
def separate_channels():
  """Has every collective that is lowered for CPUs from now on take a channel of its own."""
  from jax._src.interpreters import mlir as rules  # what holds the rules has no public name
  from jax._src.lax import parallel

  collectives = (
    parallel.all_gather_p, parallel.all_to_all_p, parallel.pmax_p, parallel.pmin_p,
    parallel.ppermute_p, parallel.psum_p, parallel.reduce_scatter_p,
  )
  for primitive in collectives:
    rule = rules._lowerings[primitive].rule
    own = functools.partial(_lower, rules, rule)
    mlir.register_lowering(primitive, own, platform="cpu", cacheable=False)


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
