"""Agreement between the processes of a run; process 0 writes its files. All processes run the same
program and must take the same decisions in the same order, so anything that may differ between them
(a signal, a file) goes through `agree`, `Votes` or `from_writer`."""

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

_WAIT_MS = 24 * 3600 * 1000  # heartbeats detect dead processes; living ones may take long
_numbers = itertools.count()


def is_writer() -> bool:
  """Tells whether this process writes the files of the run."""
  return jax.process_index() == 0


def say(text: str):
  """Prints a line on standard error, in the writing process only."""
  if is_writer():
    print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
  """Waits until every process has called this."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"llmjax/{name}", _WAIT_MS)


def all_here(wait_s: float) -> bool:
  """Tells whether every process calls this within so many seconds."""
  try:
    _client().wait_at_barrier("llmjax/all_here", int(wait_s * 1000))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def from_writer(make: Callable):
  """Calls a function, which may take long and write files, in the writing process only.

  Args:
    make: returns a value that JSON can represent.
  Returns:
    That value, in every process.
  Raises:
    UserError, RunFailed: `make` raised it; every process raises it.
  """
  if jax.process_count() == 1:
    return make()
  key = f"llmjax/from_writer/{next(_numbers)}"
  if is_writer():
    try:
      answer = {"value": make()}
    except (UserError, RunFailed) as error:
      answer = {"error": str(error), "failed": isinstance(error, RunFailed)}
    _client().key_value_set(key, json.dumps(answer))
  answer = json.loads(_client().blocking_key_value_get(key, _WAIT_MS))
  barrier(key)
  if is_writer():
    _client().key_value_delete(key)
  if "error" in answer:
    raise (RunFailed if answer["failed"] else UserError)(answer["error"])
  return answer["value"]


def to_writer(tree):
  """Gathers a sharded tree on the writing process's first device; other processes get None."""
  if jax.process_count() == 1:
    return tree

  def gather(leaf):
    full = multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_put(full, jax.local_devices()[0]) if is_writer() else None

  gathered = jax.tree.map(gather, tree)
  return gathered if is_writer() else None


def agree(flag: bool) -> bool:
  """Tells whether `flag` is set in any process; waits for all of them."""
  return bool(_any(flag)) if jax.process_count() > 1 else flag


class Votes:
  """`agree` once per step without waiting; with several processes, `depth` steps late.

  Every process gets the same answer at the same step.
  """

  def __init__(self, depth: int = 2):
    self._depth = depth
    self._queue = deque()

  def add(self, flag: bool) -> bool:
    """Adds this step's flag; returns whether any process set it `depth` steps ago."""
    if jax.process_count() == 1:
      return flag
    self._queue.append(_any(flag))
    return len(self._queue) > self._depth and bool(self._queue.popleft())


def _client():
  # jax has no public key-value store, nor a public barrier that relies on heartbeats.
  from jax._src import distributed

  return distributed.global_state.client


@functools.cache
def _voting():
  """(mesh with one device per process, sharding with one flag each, jitted `any` of them all)."""
  first = {device.process_index: device for device in reversed(jax.devices())}
  mesh = Mesh(np.array([first[number] for number in sorted(first)]), ("process",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  votes = NamedSharding(mesh, PartitionSpec("process"))
  return mesh, votes, jax.jit(jnp.any, out_shardings=everywhere)


def _any(flag: bool) -> jax.Array:
  mesh, sharding, count_votes = _voting()
  here = jax.device_put(np.array([flag]), *sharding.addressable_devices)
  votes = jax.make_array_from_single_device_arrays((mesh.size,), sharding, [here])
  with jax.set_mesh(mesh):  # the run's mesh, which may be in scope, has other devices
    return count_votes(votes)
