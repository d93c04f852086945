"""Dispatch of tokens to experts and back: sorted by expert, exchanged where experts are sharded.

All mesh axes are manual, so that a token's route is the same whatever else is sharded.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core.platform import platform
from llmjax.parallel.rules import inside, stream_spec, weight_specs


def by_expert(run: Callable, x_btd, experts_btj, factors_btj, weights: dict, slots: int = 0):
  """Sums the results of each token's experts.

  Args:
    run: (rows_td, weights, sizes_e) → rows_td; rows are grouped by expert, and those after the last
      group are not read. Where feed-forward width is sharded, a partial sum.
    x_btd: residual stream, as `shard_stream` lays it out.
    experts_btj: int32; the number of experts where there is none.
    factors_btj: fp32 factors on what `run` returns.
    weights: the experts', by name; the name ends in the letters.
    slots: most tokens of a row that an expert takes; 0: any number.
  Returns:
    y_btd, as `shard_stream` lays it out.
  Source: expert parallelism: Lepikhin et al. 2020, arXiv:2006.16668, sec. 3.
  """
  experts = next(iter(weights.values())).shape[0]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, 1, slots)
  shards = {name: 1 if inside(name) else size for name, size in mesh.shape.items()}
  stream = stream_spec(x_btd.shape[1])

  def local(x, numbers, factors, weights):
    if shards["tensor"] > 1 and "tensor" in stream[1]:
      x, numbers, factors = (
        jax.lax.all_gather(a, "tensor", axis=1, tiled=True) for a in (x, numbers, factors)
      )
    y_btd = _on_device(run, x, numbers, factors, weights, experts, shards["expert"], slots)
    if shards["tensor"] == 1:
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


def _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, shards, slots):
  """One device's tokens; `experts` counts those of all `shards` devices along `expert`."""
  (b, t, d), j = x_btd.shape, experts_btj.shape[2]
  numbers = experts_btj.reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  back = jnp.argsort(order)
  rows = min(len(numbers), b * experts * slots or len(numbers))
  sizes_e = (numbers[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
  order, back = order[:rows], jnp.where(back < sizes_e.sum(), back, rows)
  x_sorted_td = _spread(x_btd.reshape(b * t, d), order, back, j)
  if shards == 1:
    y_sorted_td = run(x_sorted_td, weights, sizes_e)
  else:
    most = min(j, experts // shards) * b * t
    most = min(most, b * slots * (experts // shards) or most)
    y_sorted_td = _exchange(run, x_sorted_td, weights, sizes_e, shards, min(rows, most))
  # First all tokens' first experts, then all second ones: a TPU would copy the other order.
  by_choice = order % j * b * t + order // j
  y_jtd = _take(y_sorted_td, _by_choice(back, j), by_choice).reshape(j, b * t, d)
  factors_jt = factors_btj.reshape(b * t, j).T.astype(x_btd.dtype).astype(jnp.float32)
  return _weigh(y_jtd, factors_jt).reshape(b, t, d)


def _by_choice(back, j: int):
  """Reorders from token by token to first all tokens' first experts, then all second ones."""
  return back.reshape(-1, j).T.reshape(-1)


@jax.custom_vjp
def _weigh(y_jtd, factors_jt):
  """Weighted sum over j in fp32; no [j, t, d] array is written in fp32, in either direction."""
  return (y_jtd * factors_jt[..., None]).sum(0).astype(y_jtd.dtype)


def _weigh_backward(residuals, grad_td):
  y_jtd, factors_jt = residuals
  grad_td = grad_td.astype(jnp.float32)
  grad_jtd = (grad_td * factors_jt[..., None]).astype(y_jtd.dtype)
  return jax.lax.optimization_barrier(grad_jtd), (grad_td * y_jtd).sum(-1)


_weigh.defvjp(lambda *both: (_weigh(*both), both), _weigh_backward)


def _exchange(run, x_td, weights, sizes_e, shards: int, most: int):
  """Sends each group of rows to the device that holds its expert, and the results back.

  A device has at most `most` rows for another. `sizes` counts rows by sender, by receiver and
  by the receiver's experts; a receiver holds them sorted by expert, then by sender.
  """
  sizes = jax.lax.all_gather(sizes_e, "expert").reshape(shards, shards, -1)
  transport = _padded if platform() == "cpu" else _ragged
  send, send_back = transport(sizes, most, len(x_td))
  sizes_e = sizes[:, jax.lax.axis_index("expert")].sum(0)
  return send_back(run(send(x_td), weights, sizes_e))


def _ragged(sizes, most: int, rows: int):
  """Exchanges the rows there are, by ragged all-to-all: (send, send back)."""
  here, shards = jax.lax.axis_index("expert"), len(sizes)
  starts = _before(sizes)
  targets = _before(sizes.transpose(1, 2, 0)).transpose(2, 0, 1)
  out = starts[here], sizes[here], targets[here], sizes[:, here]
  home = targets[:, here], sizes[:, here], starts[:, here], sizes[here]
  out, home = ([a.reshape(-1) for a in plan] for plan in (out, home))
  received = shards * most
  return (
    lambda x_td: _travel(received, rows, x_td, out, home),
    lambda y_td: _travel(rows, received, y_td, home, out),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(to, fro, x_td, there, back):
  """Sends each group to its place among `to` rows; rows that none fills are uninitialized."""
  into_td = jax.lax.empty((to, x_td.shape[1]), x_td.dtype)
  return jax.lax.ragged_all_to_all(x_td, into_td, *there, axis_name="expert")


def _travel_forward(to, fro, x_td, there, back):
  return _travel(to, fro, x_td, there, back), (there, back)


def _travel_backward(to, fro, residuals, grad_td):
  there, back = residuals
  return _travel(fro, to, grad_td, back, there), None, None


_travel.defvjp(_travel_forward, _travel_backward)


def _before(sizes):
  """Sums the entries before each one, along all axes but the first."""
  flat = sizes.reshape(len(sizes), -1)
  return (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


def _padded(sizes, most: int, rows: int):
  """Exchanges `most` rows between any two devices, sorted by the receiver: (send, send back)."""
  here, shards = jax.lax.axis_index("expert"), len(sizes)
  sent = sizes[here].sum(1)
  first = jnp.cumsum(sent) - sent
  slot, row = jnp.arange(most), jnp.arange(rows)
  there = jnp.where(slot < sent[:, None], first[:, None] + slot, rows).reshape(-1)
  receiver = jnp.searchsorted(jnp.cumsum(sent), row, side="right")
  back = receiver * most + row - first[jnp.minimum(receiver, shards - 1)]
  back = jnp.where(receiver < shards, back, shards * most)
  ends = jnp.cumsum(sizes[:, here], axis=1)
  numbers = (slot[None, :, None] >= ends[:, None]).sum(-1).reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  undone = jnp.argsort(order)

  def swap(x):
    shaped = x.reshape(shards, most, -1)
    return jax.lax.all_to_all(shaped, "expert", 0, 0).reshape(shards * most, -1)

  return (
    lambda x_td: _take(swap(_take(x_td, there, back)), order, undone),
    lambda y_td: _take(swap(_take(y_td, undone, order)), back, there),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_td, there, back, j: int):
  """Takes rows of x, each of which j (token, expert) pairs share, by the number of the pair."""
  return x_td.at[there // j].get(mode="fill", fill_value=0)


def _spread_forward(x_td, there, back, j):
  return _spread(x_td, there, back, j), back


def _spread_backward(j, back, grad_td):
  grad_jtd = grad_td.at[_by_choice(back, j)].get(mode="fill", fill_value=0)
  grad_jtd = grad_jtd.reshape(j, len(back) // j, -1).astype(jnp.float32)
  return grad_jtd.sum(0).astype(grad_td.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _take(x_td, there, back):
  """Takes rows of x by number, zeros for an out-of-range number; `back` undoes `there`.

  With the inverse at hand the gradient is a gather too, where a scatter would be slow.
  """
  return x_td.at[there].get(mode="fill", fill_value=0)


def _take_forward(x_td, there, back):
  return _take(x_td, there, back), (there, back)


def _take_backward(residuals, grad_td):
  there, back = residuals
  return _take(grad_td, back, there), None, None


_take.defvjp(_take_forward, _take_backward)
