"""Tokens to their experts and back: sorted into runs, and exchanged where experts are cut.

Permutations and an all-to-all; what experts do with their rows is a function given. All axes are
taken by hand, so that a token's way is the same whatever else is cut.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core.platform import platform
from llmjax.parallel.rules import inside, stream_spec, weight_specs


def by_expert(run: Callable, x_btd, experts_btj, factors_btj, weights: dict, slots: int = 0):
  """Sums what each token's experts make of it.

  Args:
    run: (rows_td, weights, sizes_e) → rows_td; rows stand in runs, one run an expert, and what
      stands behind the last is not read. Where feed-forward width is cut, each device's part of a
      sum.
    x_btd: residual stream, as `shard_stream` lays it out.
    experts_btj: int32; the number of experts where there is none.
    factors_btj: fp32 factors on what `run` returns.
    weights: the experts', by name; the name ends in the letters.
    slots: most tokens of a row that an expert takes; 0: any number.
  Returns:
    y_btd, as `shard_stream` lays it out.
  Source: experts on devices of their own: Lepikhin et al. 2020, arXiv:2006.16668, sec. 3.
  """
  experts = next(iter(weights.values())).shape[0]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, 1, slots)
  ways = {name: 1 if inside(name) else size for name, size in mesh.shape.items()}
  stream = stream_spec(x_btd.shape[1])

  def local(x, numbers, factors, weights):
    if ways["tensor"] > 1 and "tensor" in stream[1]:
      x, numbers, factors = (
        jax.lax.all_gather(a, "tensor", axis=1, tiled=True) for a in (x, numbers, factors)
      )
    y_btd = _on_device(run, x, numbers, factors, weights, experts, ways["expert"], slots)
    if ways["tensor"] == 1:
      return y_btd
    if "tensor" in stream[1]:
      return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True)
    return jax.lax.psum(y_btd, "tensor")

  return jax.shard_map(
    local,
    in_specs=(stream, stream, stream, weight_specs(weights)),
    out_specs=stream,
    axis_names={name for name in mesh.axis_names if not inside(name)},
    check_vma=False,
  )(x_btd, experts_btj, factors_btj, weights)


def _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, ways, slots):
  """One device's tokens; `experts` is the number of all, of which each of `ways` holds a part."""
  (b, t, d), j = x_btd.shape, experts_btj.shape[2]
  numbers = experts_btj.reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  back = jnp.argsort(order)
  places = min(len(numbers), b * experts * slots or len(numbers))
  sizes_e = (numbers[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
  order, back = order[:places], jnp.where(back < sizes_e.sum(), back, places)
  rows_td = _spread(x_btd.reshape(b * t, d), order, back, j)
  if ways == 1:
    made_td = run(rows_td, weights, sizes_e)
  else:
    most = min(j, experts // ways) * b * t
    most = min(most, b * slots * (experts // ways) or most)
    made_td = _exchange(run, rows_td, weights, sizes_e, ways, min(places, most))
  # A token's first experts, then all second ones: of the other way round a TPU makes a copy.
  turned = order % j * b * t + order // j
  made_jtd = _take(made_td, _turned(back, j), turned).reshape(j, b * t, d)
  factors_jt = factors_btj.reshape(b * t, j).T.astype(x_btd.dtype).astype(jnp.float32)
  return _weigh(made_jtd, factors_jt).reshape(b, t, d)


def _turned(back, j: int):
  """Places of all tokens' first experts, of all second ones, and so on."""
  return back.reshape(-1, j).T.reshape(-1)


@jax.custom_vjp
def _weigh(made_jtd, factors_jt):
  """Sums over j in fp32; nothing of [j, t, d] is ever written in fp32, in either direction."""
  return (made_jtd * factors_jt[..., None]).sum(0).astype(made_jtd.dtype)


def _weigh_backward(residuals, grad_td):
  made_jtd, factors_jt = residuals
  grad_td = grad_td.astype(jnp.float32)
  grad_jtd = (grad_td * factors_jt[..., None]).astype(made_jtd.dtype)
  return jax.lax.optimization_barrier(grad_jtd), (grad_td * made_jtd).sum(-1)


_weigh.defvjp(lambda *both: (_weigh(*both), both), _weigh_backward)


def _exchange(run, rows_td, weights, sizes_e, ways: int, most: int):
  """Sends each run to the device that holds its expert, and what becomes of it back.

  A device has at most `most` rows for another. `sizes_swe` counts them by sender, by owner and by
  the owner's experts; at the owner they stand by expert, then by sender.
  """
  sizes_swe = jax.lax.all_gather(sizes_e, "expert").reshape(ways, ways, -1)
  move = _padded if platform() == "cpu" else _ragged
  send, bring = move(sizes_swe, most, len(rows_td))
  sizes_e = sizes_swe[:, jax.lax.axis_index("expert")].sum(0)
  return bring(run(send(rows_td), weights, sizes_e))


def _ragged(sizes_swe, most: int, places: int):
  """Moves what there is and no more: each run goes to its place on the device that holds it."""
  me = jax.lax.axis_index("expert")
  ways = len(sizes_swe)
  from_swe = _before(sizes_swe)
  to_swe = _before(sizes_swe.transpose(1, 2, 0)).transpose(2, 0, 1)
  out = from_swe[me], sizes_swe[me], to_swe[me], sizes_swe[:, me]
  home = to_swe[:, me], sizes_swe[:, me], from_swe[:, me], sizes_swe[me]
  out, home = ([a.reshape(-1) for a in way] for way in (out, home))
  away, at_home = ways * most, places

  def send(x_td):
    return _travel(away, at_home, x_td, out, home)

  def bring(made_td):
    return _travel(at_home, away, made_td, home, out)

  return send, bring


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(to, fro, x_td, there, back):
  """Sends each run to its place among `to` rows; those that none fills hold anything."""
  into_td = jax.lax.empty((to, x_td.shape[1]), x_td.dtype)
  return jax.lax.ragged_all_to_all(x_td, into_td, *there, axis_name="expert")


def _travel_forward(to, fro, x_td, there, back):
  return _travel(to, fro, x_td, there, back), (there, back)


def _travel_backward(to, fro, residuals, grad_td):
  there, back = residuals
  return _travel(fro, to, grad_td, back, there), None, None


_travel.defvjp(_travel_forward, _travel_backward)


def _before(sizes):
  """Sums what stands before each entry in its row of the first axis."""
  flat = sizes.reshape(len(sizes), -1)
  return (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


def _padded(sizes_swe, most: int, places: int):
  """Moves `most` rows between each two devices and sorts them there."""
  me = jax.lax.axis_index("expert")
  ways = len(sizes_swe)
  sent_w = sizes_swe[me].sum(1)
  first_w = jnp.cumsum(sent_w) - sent_w
  slot, row = jnp.arange(most), jnp.arange(places)
  there = jnp.where(slot < sent_w[:, None], first_w[:, None] + slot, places).reshape(-1)
  owner = jnp.searchsorted(jnp.cumsum(sent_w), row, side="right")
  at = owner * most + row - first_w[jnp.minimum(owner, ways - 1)]
  back = jnp.where(owner < ways, at, ways * most)
  ends_we = jnp.cumsum(sizes_swe[:, me], axis=1)
  numbers = (slot[None, :, None] >= ends_we[:, None]).sum(-1).reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  undone = jnp.argsort(order)

  def swap(x):
    shaped = x.reshape(ways, most, -1)
    return jax.lax.all_to_all(shaped, "expert", 0, 0).reshape(ways * most, -1)

  def send(x_td):
    return _take(swap(_take(x_td, there, back)), order, undone)

  def bring(made_td):
    return _take(swap(_take(made_td, undone, order)), back, there)

  return send, bring


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_td, there, back, j: int):
  """Rows of x, of which each stands for j places, by the number of a place."""
  return x_td.at[there // j].get(mode="fill", fill_value=0)


def _spread_forward(x_td, there, back, j):
  return _spread(x_td, there, back, j), back


def _spread_backward(j, back, grad_td):
  grad_jtd = grad_td.at[_turned(back, j)].get(mode="fill", fill_value=0)
  grad_jtd = grad_jtd.reshape(j, len(back) // j, -1).astype(jnp.float32)
  return grad_jtd.sum(0).astype(grad_td.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _take(x_td, there, back):
  """Rows of x by number, zeros for the number that is one too many; `back` undoes `there`.

  Knowing the way back makes the gradient a gather too, where a scatter would be slow.
  """
  return x_td.at[there].get(mode="fill", fill_value=0)


def _take_forward(x_td, there, back):
  return _take(x_td, there, back), (there, back)


def _take_backward(residuals, grad_td):
  there, back = residuals
  return _take(grad_td, back, there), None, None


_take.defvjp(_take_forward, _take_backward)
