"""Pipeline parallelism: executes a schedule's table tick by tick, each stage its own action. A
stage saves the inputs of its chunks and recomputes a chunk for its gradient. A backward pass that
is split in two saves the residuals of its second half instead of recomputing them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from llmjax.parallel.schedules import Schedule, tables

_AXIS = "stage"


class Totals(NamedTuple):
  """Sums over a step's microbatches.

  Attributes:
    weights: gradient of this stage's chunks.
    outer: gradient of the weights outside the chunks; still to be summed over stages.
    sums: the other results of chunks; likewise.
  """

  weights: object
  outer: object
  sums: object


def run_pipeline(schedule: Schedule, chunk: Callable, weights, outer, x, sums, common) -> Totals:
  """Runs a training step's microbatches through the stages; inside `shard_map` over `stage`.

  Args:
    schedule: the action of each stage in each tick.
    chunk: (weights of one chunk, outer, x, virtual stage, microbatch) → (x, objective, sums).
      The objective and sums of all but the last virtual stage are zeros; the first does not read x.
    weights: this stage's, with a leading axis of chunks.
    outer: the weights outside the chunks, held by every stage.
    x: shape and dtype of the activations between stages.
    sums: shapes and dtypes of a chunk's last result.
    common: for each leaf of `outer`, whether every virtual stage reads it (see `leaves_read`); the
      others are read by the first and the last only.
  Returns:
    Gradients of the summed objective, and the sums.
  """
  plan, stages = tables(schedule), schedule.stages
  actions, residuals = _actions(schedule, chunk, weights, outer, x, common)
  index = jax.lax.axis_index(_AXIS)

  def tick(carry, table):
    totals, buffers = carry
    now = jax.tree.map(lambda by_stage: by_stage[index], table)
    values = _Buffers(*map(_read, buffers, now.buffers))
    values = values._replace(gradient=jax.tree.map(  # the last virtual stage has its objective's
      lambda grad: jnp.where(now.gradient.read < 0, jnp.zeros_like(grad), grad), values.gradient
    ))
    virtual = now.chunk * stages + index
    totals, up, down, pending = jax.lax.switch(now.kind, actions, now, virtual, totals, values)
    up = jax.lax.ppermute(up, _AXIS, [(i, (i + 1) % stages) for i in range(stages)])
    down = jax.lax.ppermute(down, _AXIS, [(i, (i - 1) % stages) for i in range(stages)])
    buffers = _Buffers(*map(_write, buffers, now.buffers, (values.activation, up, down, pending)))
    return (totals, buffers), None

  buffers = _Buffers(*map(_allocate, (x, x, x, residuals), plan.buffers))
  start = Totals(*map(_zeros, (weights, outer, sums)))
  (totals, _), _ = jax.lax.scan(tick, (start, buffers), jax.tree.map(jnp.asarray, plan))
  return totals


def leaves_read(function: Callable, argument):
  """Finds which leaves of an argument a function's result depends on: a tree of bools.

  A leaf passed to a nested program counts as read.
  """
  jaxpr = jax.make_jaxpr(function)(argument).jaxpr
  read = [var for eqn in _needed(jaxpr.eqns, jaxpr.outvars) for var in eqn.invars]
  read = _variables(read + jaxpr.outvars)
  return jax.tree.unflatten(jax.tree.structure(argument), [var in read for var in jaxpr.invars])


def _actions(schedule: Schedule, chunk: Callable, weights, outer, x, common) -> tuple:
  """The actions in the order of `CODES`, and the shapes of the residuals that B saves for W. An
  action is (its entries of the tables, virtual stage, totals, values of its buffers) → (totals,
  activation for the next stage, gradient for the previous one, residuals)."""
  split, backward, residuals = schedule.kind == "zb_h1", functools.partial(_gradients, chunk), ()
  if split:
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weights)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    backward, finish, residuals = split_backward(backward, one, outer, x, number, number, x)
  last = schedule.stages * schedule.chunks - 1

  def idle(now, virtual, totals, values):
    return totals, _zeros(x), _zeros(x), _zeros(residuals)

  def forward(now, virtual, totals, values):
    y, *_ = chunk(_take(weights, now.chunk), outer, values.activation, virtual, now.microbatch)
    return totals, y, _zeros(x), _zeros(residuals)

  def back(now, virtual, totals, values):
    one = _take(weights, now.chunk)
    # `rest` is the weights' gradient, or the residuals that `finish` computes it from.
    (grad_x, grad_outer, sums), rest = backward(
      one, outer, values.saved, virtual, now.microbatch, values.gradient
    )
    first_or_last = (virtual == 0) | (virtual == last)
    add_all = lambda: jax.tree.map(jnp.add, totals.outer, grad_outer)  # noqa: E731
    add_common = lambda: jax.tree.map(  # noqa: E731
      lambda read, total, grad: total + grad if read else total, common, totals.outer, grad_outer
    )
    totals = Totals(
      totals.weights if split else _add(totals.weights, rest, now.chunk),
      jax.lax.cond(first_or_last, add_all, add_common), jax.tree.map(jnp.add, totals.sums, sums),
    )
    return totals, _zeros(x), grad_x, rest if split else ()

  def weight(now, virtual, totals, values):
    grads = finish(values.pending, _take(weights, now.chunk), outer)
    totals = totals._replace(weights=_add(totals.weights, grads, now.chunk))
    return totals, _zeros(x), _zeros(x), _zeros(residuals)

  return [idle, forward, back, weight][: 4 if split else 3], residuals


class _Buffers(NamedTuple):  # see `Tables`
  saved: object
  activation: object
  gradient: object
  pending: object


def _gradients(chunk, weights, outer, x, virtual, microbatch, grad):
  """((gradient of x, of outer, sums), gradient of weights) of a chunk."""

  def scored(weights, outer, x):
    y, objective, sums = chunk(weights, outer, x, virtual, microbatch)
    return (y, objective), sums

  _, pull, sums = jax.vjp(scored, weights, outer, x, has_aux=True)
  grad_weights, grad_outer, grad_x = pull((grad, jnp.float32(1)))
  return (grad_x, grad_outer, sums), grad_weights


def split_backward(function: Callable, weights, outer, *rest) -> tuple:
  """Splits a function with two results into one for the first and one for the second.

  Returns:
    (arguments → (first result, residuals); (residuals, weights, outer) → second result; shapes of
    the residuals: the values of the first half that the second reads).
  """
  closed, shape = jax.make_jaxpr(function, return_shape=True)(weights, outer, *rest)
  trees = [jax.tree.structure(result) for result in shape]
  jaxpr, count = closed.jaxpr, trees[0].num_leaves
  results = jaxpr.outvars[:count], jaxpr.outvars[count:]
  first = _needed(jaxpr.eqns, results[0])
  done = set(map(id, first))
  second = _needed([eqn for eqn in jaxpr.eqns if id(eqn) not in done], results[1])
  known = jaxpr.invars[: len(jax.tree.leaves((weights, outer)))]  # arguments of both halves
  computed = {var for eqn in first for var in eqn.outvars} | {*jaxpr.invars} - {*known}
  read = _variables([var for eqn in second for var in eqn.invars] + results[1])
  residuals = [var for var in read if var in computed]

  def subprogram(invars, outvars, eqns):
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    half = jaxpr.replace(invars=invars, outvars=outvars, eqns=eqns, debug_info=info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(half, closed.consts))

  one = subprogram(jaxpr.invars, [*results[0], *residuals], first)
  two = subprogram([*residuals, *known], results[1], second)

  def start(*arguments):
    values = one(*jax.tree.leaves(arguments))
    return trees[0].unflatten(values[:count]), tuple(values[count:])

  def finish(residuals, weights, outer):
    return trees[1].unflatten(two(*residuals, *jax.tree.leaves((weights, outer))))

  return start, finish, tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in residuals)


def _variables(atoms) -> dict:  # an ordered set, without literals
  return dict.fromkeys(atom for atom in atoms if isinstance(atom, core.Var))


def _needed(eqns, outvars) -> list:
  """The equations that some outputs depend on, in order."""
  wanted, kept = set(_variables(outvars)), []
  for eqn in reversed(eqns):
    if wanted & set(eqn.outvars) or eqn.effects:
      wanted |= set(_variables(eqn.invars))
      kept.append(eqn)
  return kept[::-1]


def _zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def _take(stacked, index):
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), stacked)


def _add(totals, grads, chunk):
  add = lambda total, grad: total.at[chunk].add(grad.astype(total.dtype))  # noqa: E731
  return jax.tree.map(add, totals, grads)


def _allocate(like, buffer):
  slots = max(1, int(np.max(buffer.slots)))
  return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), like)


def _read(values, slots):
  return _take(values, jnp.maximum(slots.read, 0))


def _write(values, slots, value):
  """Writes one value; slot -1 leaves the buffer as it is."""
  slot = jnp.maximum(slots.write, 0)

  def put(values, one):
    one = jnp.where(slots.write < 0, _take(values, slot), one)
    return jax.lax.dynamic_update_index_in_dim(values, one, slot, 0)

  return jax.tree.map(put, values, value)
