"""The proof that every mesh equals one device: loss, every gradient, and three optimizer steps. The
reference runs the full batch on one device without a mesh in scope: it shares the model's code, and
no constraint, collective or schedule."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.data.loader import place
from llmjax.parallel.collectives import collectives, describe
from llmjax.parallel.hlo_arrays import compile_and_watch
from llmjax.parallel.mesh import AXES, MeshConfig, make_mesh
from llmjax.parallel.rules import LayoutError, axes_of, batch_sharding
from llmjax.training.config import Config, TrainConfig
from llmjax.training.parameters import TrainState, abstract_state, init_state
from llmjax.training.runnable import check_config, check_mesh
from llmjax.training.shrink import made_up_batch, shrink
from llmjax.training.step import advance, compile_step

STEPS = 3
_VERDICTS = {"equal": True, "off": False, "left_out": None}  # a row's `ok`
# fp32 sums of a few thousand terms in another order differ by some 1e-6 of the result; a lost or
# doubled sum is wrong by a share of it.
LOSS_LIMIT = 1e-5
GRADIENT_LIMIT = 5e-5
# A gradient that is nearly zero is all rounding: errors are relative to at least this share of the
# global norm.
_FLOOR = 1e-2
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Six groups of three axes in which every pair of the six axes occurs.
_TRIPLES = ((0, 1, 2), (0, 1, 3), (0, 4, 5), (1, 4, 5), (2, 3, 4), (2, 3, 5))


@dataclasses.dataclass(frozen=True)
class Observed:
  """Results of three steps.

  Attributes:
    losses: nats per prediction, of each step.
    grads: by path, of the first step, before clipping.
    weights: trainable ones by path, after the last step.
    peak_bytes: of one device, as XLA reports it: arguments, results and temporaries.
    traffic: the compiled step's collectives in words.
  """

  losses: list[float]
  grads: dict[str, np.ndarray]
  weights: dict[str, np.ndarray]
  peak_bytes: int = 0
  traffic: str = ""


def check(config: Config, devices: int = 8, meshes: Sequence[dict] = (), report=None) -> dict:
  """Compares a config, shrunk by rule, on every mesh with one device.

  Args:
    devices: of every mesh; there must be as many.
    meshes: sizes by axis, 1 where an axis is missing; by default those of `some_meshes`.
    report: called with each mesh's row as it is done.
  Returns:
    {"meshes": rows, "ok": none is off, and how many are `equal`, `off` and `left_out`}. A row:
    `mesh`; `loss_diff`, relative, the largest of three steps; `worst_leaf` and `worst_rel`, the
    gradient with the largest error relative to its norm; `peak_bytes`; `collectives`; `ok`; and
    `error` of a mesh that cannot run this config: there `ok` is None, or False if rules do not
    shard what the mesh says.
  Raises:
    UserError: too few devices, a model that does not learn from text, or no mesh that can run it.
  """
  if len(jax.devices()) < devices:
    raise UserError(f"check wants {devices} devices and there are {len(jax.devices())}")
  small = shrink(check_config(config), devices)
  batch = made_up_batch(small)
  reference = on_one_device(small, batch)
  rows = []
  for sizes in meshes or some_meshes(devices):
    rows.append(_row(small, sizes, batch, reference))
    if report:
      report(rows[-1])
  count = {name: sum(row["ok"] is ok for row in rows) for name, ok in _VERDICTS.items()}
  if count["left_out"] == len(rows):
    raise UserError(f"none of {len(rows)} meshes can run this config: {rows[-1]['error']}")
  return {"meshes": rows, "ok": not count["off"], **count}


def some_meshes(devices: int) -> Iterator[dict[str, int]]:
  """Lists each axis alone and meshes of three axes in which every pair of axes occurs.

  Of 8 devices these are 12 of the 56 that `all_meshes` lists: each axis alone, and 2 × 2 × 2 for
  six groups of three axes. If there is no such cube, all meshes of two axes replace them.
  """
  yield from ({axis: devices} for axis in AXES)
  side = round(devices ** (1 / 3))
  if side > 1 and side**3 == devices:
    yield from ({AXES[i]: side for i in triple} for triple in _TRIPLES)
  else:
    yield from (sizes for sizes in all_meshes(devices) if len(sizes) == 2)


def all_meshes(devices: int) -> Iterator[dict[str, int]]:
  """Lists every mesh of so many devices; axes of size 1 are left out."""
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  for sizes in itertools.product(divisors, repeat=len(AXES)):
    if math.prod(sizes) == devices:
      yield {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1}


def on_one_device(config: Config, batch: Batch) -> Observed:
  """Runs the reference: no mesh and no micro-batches.

  Dropout and load balance depend on the micro-batches; with them the reference has them too.
  """
  if not config.model.dropout and not config.model.moe.experts:
    train = dataclasses.replace(config.train, grad_accum_steps=1)
    config = dataclasses.replace(config, train=train)
  state = jax.device_put(_start(config), jax.devices()[0])
  step = jax.jit(lambda state, batch: advance(state, batch, config), compiler_options=_quick())
  compiled = step.lower(state, batch).compile()
  return _steps(compiled, state, batch)


def on_mesh(config: Config, mesh: Mesh, batch: Batch, watch: bool = False) -> Observed:
  """Runs three steps on a mesh, by the function that training compiles.

  Raises:
    LayoutError: with `watch`, if an activation is replicated on every device.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
  state = jax.device_put(_start(config), shardings)
  placed = place(batch, batch_sharding(mesh))
  step = compile_step(config, mesh, with_grads=True)
  with jax.set_mesh(mesh):
    lowered = step.lower(state, placed)
    if watch:
      compiled = _watched(lowered, config, state, mesh)
    else:
      compiled = lowered.compile(compiler_options=_quick())
    seen = _steps(compiled, state, placed)
  memory = compiled.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  return dataclasses.replace(
    seen, peak_bytes=peak - memory.alias_size_in_bytes,
    traffic=describe(collectives(compiled.as_text(), mesh)),
  )


def _start(config: Config) -> TrainState:
  """The state of step 0 in the host's memory: but for rounding, what `init_sharded` makes."""
  train = TrainConfig(steps=config.train.steps)
  return _init(Config(seed=config.seed, model=config.model, optim=config.optim, train=train))


@functools.cache
def _init(config: Config) -> TrainState:
  """Initializes once for all meshes: on a CPU it takes longer to compile than a step."""
  init = jax.jit(lambda: init_state(config), compiler_options=_quick())
  return jax.tree.map(np.array, init())  # copies, since a step takes its state's memory


def _watched(lowered, config: Config, state: TrainState, mesh: Mesh):
  """Compiles a step; refuses one with a replicated array of the residual stream's size or more."""
  micro_batch = config.data.batch_size // config.train.grad_accum_steps
  stream_bytes = 4 * micro_batch * config.model.max_seq_len * config.model.width
  weight_bytes = max(4 * leaf.size for leaf in jax.tree.leaves((state.trainable, state.frozen)))
  compiled, found = compile_and_watch(lowered, max(stream_bytes, weight_bytes + 1), _quick())
  axes = [axis for letter in "bt" for axis in axes_of(letter)]
  if found and any(mesh.shape[axis] > 1 for axis in axes):
    lines = ", ".join(f"{array.shape} of {array.source or array.operation}" for array in found[:8])
    rules = ", ".join(f"{letter} → {', '.join(axes_of(letter))}" for letter in "bt")
    raise LayoutError(f"activations are replicated, none of {rules} shards them: {lines}")
  return compiled


def _quick() -> dict:
  """Compiler options for a program that runs a few times only."""
  return _QUICK if jax.default_backend() == "cpu" else {}


def _steps(compiled, state: TrainState, batch: Batch) -> Observed:
  losses, first = [], None
  for _ in range(STEPS):
    state, metrics, grads = compiled(state, batch)
    losses.append(float(metrics["loss"]))
    first = first or jax.tree.map(np.asarray, grads)
  return Observed(losses, first, jax.tree.map(np.asarray, state.trainable))


def _row(config: Config, sizes: dict, batch: Batch, reference: Observed) -> dict:
  row = {"mesh": sizes}
  try:
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    check_mesh(config, mesh)
    seen = on_mesh(config, mesh, batch, watch=True)
  except UserError as error:
    return row | {"ok": False if isinstance(error, LayoutError) else None, "error": str(error)}
  return row | compare(seen, reference)


def compare(seen: Observed, reference: Observed) -> dict:
  """Compares losses and gradients: a row of `check` without `mesh`."""
  loss_diff = max(
    abs(a - b) / abs(b) for a, b in zip(seen.losses, reference.losses, strict=True)
  )
  total = math.sqrt(sum(float(np.sum(np.square(g))) for g in reference.grads.values()))
  errors = {
    path: float(np.linalg.norm(seen.grads[path] - grad))
    / max(float(np.linalg.norm(grad)), _FLOOR * total)
    for path, grad in reference.grads.items()
  }
  worst = max(errors, key=lambda path: (not math.isfinite(errors[path]), errors[path]))
  return {
    "loss_diff": loss_diff, "worst_leaf": worst, "worst_rel": errors[worst],
    "peak_bytes": seen.peak_bytes, "collectives": seen.traffic,
    "ok": loss_diff < LOSS_LIMIT and errors[worst] < GRADIENT_LIMIT,
  }


def show_row(row: dict) -> str:
  """Formats a row of `check`, one line."""
  mesh = " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
  if "error" in row:
    return f"{mesh:34} {'left out' if row['ok'] is None else 'OFF'}: {row['error']}"
  return (
    f"{mesh:34} {'ok' if row['ok'] else 'OFF':3}  loss {row['loss_diff']:.1e}  "
    f"worst gradient {row['worst_rel']:.1e} {row['worst_leaf']}  "
    f"{row['peak_bytes'] / 1e6:.1f} MB  {row['collectives']}"
  )


def summary(result: dict) -> str:
  """Says what `check` found, one line."""
  return (
    f"{result['equal']} of {len(result['meshes'])} meshes equal one device, "
    f"{result['off']} are off, {result['left_out']} cannot run this config"
  )
