"""Dispatch of tokens to experts and back: sorted by expert, exchanged where experts are sharded.
All mesh axes are manual, so that a token's route is the same whatever else is sharded."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core.platform import platform
from llmjax.parallel.rules import inside, on_each_device, stream_spec, weight_specs


def by_expert(run: Callable, x_btd, experts_btj, factors_btj, weights: dict, slots: int = 0):
  """Sums the results of each token's experts.

  Args:
    run: (x_td, weights, sizes_e) → y_td; tokens are grouped by expert, and those after the last
      group are not read. Where feed-forward width is sharded, a partial sum.
    x_btd: residual stream, sharded by `shard_stream`, as is the result.
    experts_btj: int32; the number of experts where there is none.
    factors_btj: fp32 factors on what `run` returns.
    weights: the experts', by name; the name ends in the letters.
    slots: capacity, the most tokens of a batch row that an expert takes; 0: any number.
  Returns:
    y_btd.
  Source: expert parallelism: Lepikhin et al. 2020, arXiv:2006.16668, sec. 3.
  """
  experts = next(iter(weights.values())).shape[0]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, 1, slots)
  shards = {name: 1 if inside(name) else size for name, size in mesh.shape.items()}
  stream = stream_spec(x_btd.shape[1])

  def local(arrays, weights):
    sequence_parallel = "tensor" in stream[1]
    if shards["tensor"] > 1 and sequence_parallel:
      arrays = (jax.lax.all_gather(array, "tensor", axis=1, tiled=True) for array in arrays)
    y_btd = _on_device(run, *arrays, weights, experts, shards["expert"], slots)
    if shards["tensor"] == 1:
      return y_btd
    if sequence_parallel:
      return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True)
    return jax.lax.psum(y_btd, "tensor")

  arrays = x_btd, experts_btj, factors_btj
  return on_each_device(local, (stream, weight_specs(weights)), stream)(arrays, weights)


def _on_device(run, x_btd, experts_btj, factors_btj, weights, experts, shards, slots):
  """One device's tokens; `experts` counts those of all `shards` devices along `expert`."""
  (b, t, d), j = x_btd.shape, experts_btj.shape[2]
  numbers = experts_btj.reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  back = jnp.argsort(order)
  tokens = min(len(numbers), b * experts * slots or len(numbers))
  sizes_e = (numbers[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
  order, back = order[:tokens], jnp.where(back < sizes_e.sum(), back, tokens)
  x_sorted_td = _repeat_tokens(x_btd.reshape(b * t, d), order, back, j)
  if shards == 1:
    y_sorted_td = run(x_sorted_td, weights, sizes_e)
  else:
    most = min(j, experts // shards) * b * t
    most = min(most, b * slots * (experts // shards) or most)
    y_sorted_td = _exchange(run, x_sorted_td, weights, sizes_e, shards, min(tokens, most))
  # First all tokens' first experts, then all second ones: a TPU would copy the other order.
  by_choice = order % j * b * t + order // j
  y_jtd = _permute(y_sorted_td, _by_choice(back, j), by_choice).reshape(j, b * t, d)
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
  """Sends each group of tokens to the device that holds its expert, and the results back. A device
  has at most `most` tokens for another. `sizes` counts tokens by sender, by receiver and by the
  receiver's experts; a receiver holds them sorted by expert, then by sender."""
  sizes = jax.lax.all_gather(sizes_e, "expert").reshape(shards, shards, -1)
  transport = _padded if platform() == "cpu" else _ragged
  send, send_back = transport(sizes, most, len(x_td))
  sizes_e = sizes[:, jax.lax.axis_index("expert")].sum(0)
  return send_back(run(send(x_td), weights, sizes_e))


def _ragged(sizes, most: int, tokens: int):
  """Exchanges the tokens there are, by ragged all-to-all: (send, send back)."""
  here, shards = jax.lax.axis_index("expert"), len(sizes)
  starts = _exclusive_sums(sizes)
  targets = _exclusive_sums(sizes.transpose(1, 2, 0)).transpose(2, 0, 1)
  out = starts[here], sizes[here], targets[here], sizes[:, here]
  home = targets[:, here], sizes[:, here], starts[:, here], sizes[here]
  out, home = ([a.reshape(-1) for a in plan] for plan in (out, home))

  def to(length, x_td, plan):  # rows that no token fills are uninitialized
    empty_td = jax.lax.empty((length, x_td.shape[1]), x_td.dtype)
    return jax.lax.ragged_all_to_all(x_td, empty_td, *plan, axis_name="expert")

  send = lambda x_td, plans: to(shards * most, x_td, plans[0])  # noqa: E731
  send_back = lambda y_td, plans: to(tokens, y_td, plans[1])  # noqa: E731
  return (
    lambda x_td: _with_transpose(send, send_back, x_td, (out, home)),
    lambda y_td: _with_transpose(send_back, send, y_td, (out, home)),
  )


def _exclusive_sums(sizes):
  flat = sizes.reshape(len(sizes), -1)
  return (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


def _padded(sizes, most: int, tokens: int):
  """Exchanges `most` rows between any two devices, sorted by the receiver: (send, send back)."""
  here, shards = jax.lax.axis_index("expert"), len(sizes)
  sent = sizes[here].sum(1)
  first = jnp.cumsum(sent) - sent
  slot, token = jnp.arange(most), jnp.arange(tokens)
  there = jnp.where(slot < sent[:, None], first[:, None] + slot, tokens).reshape(-1)
  receiver = jnp.searchsorted(jnp.cumsum(sent), token, side="right")
  back = receiver * most + token - first[jnp.minimum(receiver, shards - 1)]
  back = jnp.where(receiver < shards, back, shards * most)
  ends = jnp.cumsum(sizes[:, here], axis=1)
  numbers = (slot[None, :, None] >= ends[:, None]).sum(-1).reshape(-1)
  order = jnp.argsort(numbers, stable=True)
  undone = jnp.argsort(order)

  def swap(x):
    shaped = x.reshape(shards, most, -1)
    return jax.lax.all_to_all(shaped, "expert", 0, 0).reshape(shards * most, -1)

  return (
    lambda x_td: _permute(swap(_permute(x_td, there, back)), order, undone),
    lambda y_td: _permute(swap(_permute(y_td, undone, order)), back, there),
  )


def _repeat_tokens(x_td, there, back, j: int):
  """Takes the tokens of (token, expert) pairs, j of which share each token."""
  take = lambda x_td, ids: _gather(x_td, ids[0] // j)  # noqa: E731

  def sum_pairs(grad_td, ids):
    grad_jtd = _gather(grad_td, _by_choice(ids[1], j)).reshape(j, len(ids[1]) // j, -1)
    return grad_jtd.astype(jnp.float32).sum(0).astype(grad_td.dtype)

  return _with_transpose(take, sum_pairs, x_td, (there, back))


def _permute(x_td, there, back):
  """Takes rows of x by number, of which `back` is the inverse: the gradient is a gather too."""
  forward = lambda x_td, ids: _gather(x_td, ids[0])  # noqa: E731
  transpose = lambda grad_td, ids: _gather(grad_td, ids[1])  # noqa: E731
  return _with_transpose(forward, transpose, x_td, (there, back))


def _gather(x_td, rows):
  return x_td.at[rows].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_transpose(forward, transpose, x_td, indices):
  """forward(x, indices), a linear map of x whose gradient is transpose(grad, indices)."""
  return forward(x_td, indices)


_with_transpose.defvjp(
  lambda forward, transpose, x_td, indices: (forward(x_td, indices), indices),
  lambda forward, transpose, indices, grad_td: (transpose(grad_td, indices), None),
)
