"""Several processes, one run: how they agree, and leave the writing to one.

Every process runs the same program and takes the same decisions in the same order. What may differ
between them (a signal, a file) goes through `agree`, `Votes` or `from_writer` first: a process that
decides alone leaves the others waiting for it. With one process each function is what it seems.
"""

import functools
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core.errors import RunFailed, UserError

_WAIT_MS = 24 * 3600 * 1000  # heartbeats notice the dead; for the living we wait long
_numbers = itertools.count()


def is_writer() -> bool:
  """Tells whether this process writes the run's files; the others read them."""
  return jax.process_index() == 0


def say(text: str):
  """Prints a line on standard error, in the writer alone."""
  if is_writer():
    print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"llmjax/{name}", _WAIT_MS)


def all_here(wait_s: float) -> bool:
  """Tells whether all processes come here, the last within so many seconds."""
  try:
    _client().wait_at_barrier("llmjax/all_here", int(wait_s * 1000))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def from_writer(make: Callable):
  """Calls `make`, which may take long and write files, in the writer alone.

  Args:
    make: returns a JSON-able value.
  Returns:
    The writer's value, in every process.
  Raises:
    UserError, RunFailed: `make` raised it; every process does.
  """
  if jax.process_count() == 1:
    return make()
  key = f"llmjax/from_writer/{next(_numbers)}"
  if is_writer():
    try:
      answer = {"value": make()}
    except (UserError, RunFailed) as error:
      answer = {"error": str(error), "ours": isinstance(error, RunFailed)}
    _client().key_value_set(key, json.dumps(answer))
  answer = json.loads(_client().blocking_key_value_get(key, _WAIT_MS))
  barrier(key)
  if is_writer():
    _client().key_value_delete(key)
  if "error" in answer:
    raise (RunFailed if answer["ours"] else UserError)(answer["error"])
  return answer["value"]


def to_writer(tree):
  """Gathers a sharded tree on the writer's first device; the others get None."""
  if jax.process_count() == 1:
    return tree

  def gather(leaf):
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_put(whole, jax.local_devices()[0]) if is_writer() else None

  leaves, structure = jax.tree.flatten(tree)
  leaves = [gather(leaf) for leaf in leaves]
  return structure.unflatten(leaves) if is_writer() else None


def agree(flag: bool) -> bool:
  """Tells whether `flag` is set in any process; waits for all of them."""
  return bool(_any(flag)) if jax.process_count() > 1 else flag


class Votes:
  """`agree` once a step without waiting: answers come `depth` steps late, if there are several.

  Every process hears the same answer at the same step.
  """

  def __init__(self, depth: int = 2):
    self._depth = depth
    self._queue = deque()

  def add(self, flag: bool) -> bool:
    """Casts this step's vote; returns whether anyone said yes `depth` steps ago."""
    if jax.process_count() == 1:
      return flag
    self._queue.append(_any(flag))
    return len(self._queue) > self._depth and bool(self._queue.popleft())


def _client():
  # jax has no public barrier that heartbeats guard rather than a timeout, and no public store.
  from jax._src import distributed

  return distributed.global_state.client


@functools.cache
def _ballot():
  """(mesh of one device a process, sharding of one vote each, jitted `any` for all of them)."""
  first = {device.process_index: device for device in reversed(jax.devices())}
  mesh = Mesh(np.array([first[number] for number in sorted(first)]), ("process",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  votes = NamedSharding(mesh, PartitionSpec("process"))
  return mesh, votes, jax.jit(jnp.any, out_shardings=everywhere)


def _any(flag: bool) -> jax.Array:
  mesh, sharding, count_votes = _ballot()
  here = jax.device_put(np.array([flag]), *sharding.addressable_devices)
  votes = jax.make_array_from_single_device_arrays((mesh.size,), sharding, [here])
  with jax.set_mesh(mesh):  # that of the run may be in scope, and has other devices
    return count_votes(votes)
