"""The pipeline: carries a schedule's table out, tick by tick, each stage doing its own action.

Every stage keeps the inputs of its chunks and computes a chunk again when its gradient is due, so
what is alive is what `schedules.peak_activations` counts. A backward that is split in two keeps
what the second half reads instead of computing it twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from llmjax.parallel.schedules import Schedule, Tables, tables

_AXIS = "stage"


class Totals(NamedTuple):
  """What a pipeline adds up.

  Attributes:
    weights: gradient of this stage's chunks.
    outer: gradient of what all stages hold; to be added over stages.
    sums: whatever else a chunk returns; to be added over stages.
  """

  weights: object
  outer: object
  sums: object


def run_pipeline(schedule: Schedule, chunk: Callable, weights, outer, x, sums) -> Totals:
  """Runs a training step's microbatches through the stages; inside `shard_map` over `stage`.

  Args:
    schedule: what each stage does in each tick.
    chunk: (weights of one chunk, outer, x, virtual stage, microbatch) → (x, objective, sums).
      The objective and sums of all but the last virtual stage are zeros; the first does not read x.
    weights: this stage's, a leading axis of chunks.
    outer: held by every stage: embedding and head.
    x: description of what goes from stage to stage.
    sums: description of what a chunk returns last.
  Returns:
    Gradients of the summed objective, and the sums.
  """
  plan = tables(schedule)
  part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weights)
  backward = _Backward(chunk, schedule.splits_backward, part, outer, x)
  stages, last = schedule.stages, schedule.stages * schedule.chunks - 1
  index = jax.lax.axis_index(_AXIS)
  zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)  # noqa: E731

  def forward(row, totals, inputs):
    y, *_ = chunk(_take(weights, row.chunk), outer, inputs.x, row.virtual, row.microbatch)
    return totals, y, zeros(x), zeros(backward.kept)

  def back(row, totals, inputs):
    own = _take(weights, row.chunk)
    made = backward(own, outer, inputs.saved, row.virtual, row.microbatch, inputs.grad)
    grad_x, grad_outer, sums, grad_weights, kept = made
    at_an_end = (row.virtual == 0) | (row.virtual == last)
    add = lambda: jax.tree.map(jnp.add, totals.outer, grad_outer)  # noqa: E731
    totals = Totals(
      totals.weights if grad_weights is None else _add(totals.weights, grad_weights, row.chunk),
      jax.lax.cond(at_an_end, add, lambda: totals.outer),
      jax.tree.map(jnp.add, totals.sums, sums),
    )
    return totals, zeros(x), grad_x, kept

  def weight(row, totals, inputs):
    grad_weights = backward.weights_from(inputs.kept, _take(weights, row.chunk), outer)
    totals = totals._replace(weights=_add(totals.weights, grad_weights, row.chunk))
    return totals, zeros(x), zeros(x), zeros(backward.kept)

  def idle(row, totals, inputs):
    return totals, zeros(x), zeros(x), zeros(backward.kept)

  def tick(carry, row):
    totals, boxes = carry
    row = row.of_stage(index, stages)
    inputs = _Inputs(
      _read(boxes.activation, row.activation_read),
      _read(boxes.saved, row.saved_read),
      jax.tree.map(  # the last virtual stage's comes from its objective alone
        lambda grad: jnp.where(row.gradient_read < 0, jnp.zeros_like(grad), grad),
        _read(boxes.gradient, row.gradient_read),
      ),
      _read(boxes.pending, row.pending_read),
    )
    actions = [idle, forward, back, weight][: 4 if schedule.splits_backward else 3]
    totals, up, down, kept = jax.lax.switch(row.kind, actions, row, totals, inputs)
    up = jax.lax.ppermute(up, _AXIS, [(i, (i + 1) % stages) for i in range(stages)])
    down = jax.lax.ppermute(down, _AXIS, [(i, (i - 1) % stages) for i in range(stages)])
    boxes = _Boxes(
      _write(boxes.saved, row.saved_write, inputs.x),
      _write(boxes.activation, row.activation_write, up),
      _write(boxes.gradient, row.gradient_write, down),
      _write(boxes.pending, row.pending_write, kept),
    )
    return (totals, boxes), None

  boxes = _Boxes(
    *(_box(x, buffer) for buffer in (plan.saved, plan.activation, plan.gradient)),
    _box(backward.kept, plan.pending),
  )
  start = Totals(*map(zeros, (weights, outer, sums)))
  (totals, _), _ = jax.lax.scan(tick, (start, boxes), _Row.table(plan))
  return totals


class _Inputs(NamedTuple):
  x: object
  saved: object
  grad: object
  kept: object


class _Boxes(NamedTuple):
  saved: object
  activation: object
  gradient: object
  pending: object


class _Row(NamedTuple):
  """One tick of the tables: arrays [stage], or one stage's numbers."""

  kind: jax.Array
  chunk: jax.Array
  microbatch: jax.Array
  saved_read: jax.Array
  saved_write: jax.Array
  activation_read: jax.Array
  activation_write: jax.Array
  gradient_read: jax.Array
  gradient_write: jax.Array
  pending_read: jax.Array
  pending_write: jax.Array
  virtual: jax.Array | None = None

  @classmethod
  def table(cls, plan: Tables) -> "_Row":
    """All ticks."""
    buffers = (plan.saved, plan.activation, plan.gradient, plan.pending)
    slots = [array for buffer in buffers for array in (buffer.read, buffer.write)]
    return cls(*map(jnp.asarray, (plan.kind, plan.chunk, plan.microbatch, *slots)))

  def of_stage(self, index, stages: int) -> "_Row":
    """What one stage does."""
    own = jax.tree.map(lambda array: array[index], self)
    return own._replace(virtual=own.chunk * stages + index)


class _Backward:
  """A chunk's gradient, whole or in two halves: by input first, by weights later.

  The halves are cut out of one program: what the first computes and the second needs is kept.
  """

  def __init__(self, chunk, split: bool, weights, outer, x):
    self._chunk = chunk
    self._split = split
    self.kept = ()
    if split:
      number = jax.ShapeDtypeStruct((), jnp.int32)
      arguments = (weights, outer, x, number, number, x)
      self._cut(arguments)

  def _whole(self, weights, outer, x, virtual, microbatch, grad):
    run = lambda *a: self._chunk(*a, virtual, microbatch)  # noqa: E731

    def scored(weights, outer, x):
      y, objective, sums = run(weights, outer, x)
      return (y, objective), sums

    _, pull, sums = jax.vjp(scored, weights, outer, x, has_aux=True)
    virtual_grad = (grad, jnp.float32(1))
    grad_weights, grad_outer, grad_x = pull(virtual_grad)
    return (grad_x, grad_outer, sums), grad_weights

  def __call__(self, *arguments):
    if not self._split:
      (grad_x, grad_outer, sums), grad_weights = self._whole(*arguments)
      return grad_x, grad_outer, sums, grad_weights, ()
    flat = core.jaxpr_as_fun(self._first)(*jax.tree.leaves(arguments))
    made = jax.tree.unflatten(self._first_tree, flat[: self._first_tree.num_leaves])
    return *made, None, tuple(flat[self._first_tree.num_leaves :])

  def weights_from(self, kept, weights, outer):
    """The second half."""
    known = jax.tree.leaves((weights, outer))
    flat = core.jaxpr_as_fun(self._second)(*kept, *known)
    return jax.tree.unflatten(self._second_tree, flat)

  def _cut(self, arguments):
    closed, shape = jax.make_jaxpr(self._whole, return_shape=True)(*arguments)
    self._first_tree, self._second_tree = map(jax.tree.structure, shape)
    jaxpr, count = closed.jaxpr, self._first_tree.num_leaves
    ahead, later = jaxpr.outvars[:count], jaxpr.outvars[count:]
    first = _needed(jaxpr.eqns, ahead)
    early = {var for eqn in first for var in eqn.outvars} | set(jaxpr.invars)
    done = set(map(id, first))
    second = _needed([eqn for eqn in jaxpr.eqns if id(eqn) not in done], later)
    known = jaxpr.invars[: len(jax.tree.leaves(arguments[:2]))]  # weights: there in both halves
    read = [v for eqn in second for v in eqn.invars if isinstance(v, core.Var)]
    read += [var for var in later if isinstance(var, core.Var)]
    consts = set(jaxpr.constvars)
    crossing = [v for v in dict.fromkeys(read) if v in early and v not in {*known, *consts}]
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    make = lambda invars, outvars, eqns: core.ClosedJaxpr(  # noqa: E731
      jaxpr.replace(invars=invars, outvars=outvars, eqns=eqns, debug_info=info), closed.consts
    )
    self._first = make(jaxpr.invars, [*ahead, *crossing], first)
    self._second = make([*crossing, *known], later, second)
    self.kept = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in crossing)


def _needed(eqns, outvars) -> list:
  """The equations that some outputs need, in order."""
  wanted = {var for var in outvars if isinstance(var, core.Var)}
  kept = []
  for eqn in reversed(eqns):
    if wanted & set(eqn.outvars) or eqn.effects:
      wanted |= {var for var in eqn.invars if isinstance(var, core.Var)}
      kept.append(eqn)
  return kept[::-1]


def _take(weights, chunk):
  """One chunk's weights."""
  return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, chunk, 0, False), weights)


def _add(total, grads, chunk):
  """Adds one chunk's gradient in place."""
  one = lambda all_, grad: all_.at[chunk].add(grad.astype(all_.dtype))  # noqa: E731
  return jax.tree.map(one, total, grads)


def _box(like, buffer):
  """Room for as many values as the stage with most of them keeps."""
  slots = max(1, int(np.max(buffer.slots)))
  return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), like)


def _read(box, slot):
  return jax.tree.map(
    lambda a: jax.lax.dynamic_index_in_dim(a, jnp.maximum(slot, 0), 0, False), box
  )


def _write(box, slot, value):
  """Writes one value; slot -1 writes back what is there."""
  place = jnp.maximum(slot, 0)

  def put(all_, one):
    one = jnp.where(slot < 0, jax.lax.dynamic_index_in_dim(all_, place, 0, False), one)
    return jax.lax.dynamic_update_index_in_dim(all_, one, place, 0)

  return jax.tree.map(put, box, value)
