"""Ring attention: each device keeps its queries while keys and values travel along `context`.

A row is split into twice as many chunks as devices, c. Under a causal mask device i takes chunks i
and 2c - 1 - i, so every device computes two of a step's four tiles. Memory is O(t / c).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmjax.nn.attention.kernels import attend_part
from llmjax.nn.attention.mask import Mask, MaskSpec
from llmjax.nn.attention.scores import Scores

_AXIS = "context"
_SHARDED, _REPLICATED = PartitionSpec(None, _AXIS), PartitionSpec()
_NOTHING = jnp.finfo(jnp.float32).min


class _Static(NamedTuple):
  """What is known when compiling."""

  rule: MaskSpec
  scale: float
  softcap: float
  block: int


def ring_attend(q_btnh, k_btkh, v_btkh, mask: Mask, scores: Scores, block: int):
  """Computes attention of rows whose positions are cut along `context`.

  Args:
    q_btnh: queries, t cut; keys and values are cut alike.
    mask: an aligned one.
    block: queries of a tile that are scored at a time.
  Returns:
    o_btnh, dtype of `q_btnh`.
  Source: Liu et al. 2023, arXiv:2310.01889; order of chunks: Brandon et al. 2023,
    arXiv:2311.09431, and Llama 3, arXiv:2407.21783, sec. 3.3.2.
  """
  static = _Static(mask.rule, scores.scale, scores.softcap, block)
  rows = (mask.q_positions_bt, mask.q_segments_bt, mask.prefix_bs)
  o_btnh = _ring(static, (q_btnh, k_btkh, v_btkh), (scores.bias, scores.sinks_n), rows)
  return checkpoint_name(o_btnh, "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, qkv, extra, rows):
  return _ring_forward(static, qkv, extra, rows)[0]


def _ring_forward(static, qkv, extra, rows):
  out, saved = _on_ring(_forward, static, (_SHARDED, _SHARDED))(qkv, extra, rows)
  return out, (saved, extra)


def _ring_backward(static, residuals, grad):
  return *_on_ring(_backward, static, (_SHARDED, _REPLICATED))(*residuals, grad), None


_ring.defvjp(_ring_forward, _ring_backward)


def _on_ring(function, static, out_specs):
  # Manual along this axis only: batch and heads are left to the compiler.
  return jax.shard_map(
    functools.partial(function, static), in_specs=(_SHARDED, _REPLICATED, _SHARDED),
    out_specs=out_specs, axis_names={_AXIS}, check_vma=False,
  )


def _forward(static, qkv, extra, rows):
  """Runs on one device: (o_btnh, residuals of the backward pass, in the order of chunks)."""
  order = _Order(static.rule, qkv[0].shape[1], rows[2] is not None)
  (q, k, v), rows = order.take((qkv, rows))
  bias, sinks_n = extra
  queries = order.split((q, rows[:2]))
  start = [_no_part(q_piece, v) for q_piece, _ in queries]

  def step(carry, number):
    parts, travelling = carry
    keys = order.split(travelling)
    tile = functools.partial(_tile, static)
    nothing = lambda own, other, _: _no_part(own[0], other[0][1])  # noqa: E731
    for i, j, needed in order.tiles(number):
      part = jax.lax.cond(needed, tile, nothing, queries[i], keys[j], bias)
      parts[i] = _merge(parts[i], part)
    return (parts, _pass_on(travelling)), None

  travelling = ((k, v), rows)
  (parts, _), _ = jax.lax.scan(step, (start, travelling), jnp.arange(order.shards))
  o, lse = order.join(parts)
  if sinks_n is not None:
    with_sink = jnp.logaddexp(lse, sinks_n)
    o, lse = o * jnp.exp(lse - with_sink)[..., None], with_sink
  o = o.astype(q.dtype)
  return order.give(o), (q, k, v, o, lse, *rows)


def _backward(static, saved, extra, grad):
  """Runs on one device: gradients ((dq, dk, dv), (bias, sinks))."""
  q, k, v, o, lse, *rows = saved
  bias, sinks_n = extra
  order = _Order(static.rule, q.shape[1], rows[2] is not None)
  grad = order.take(grad).astype(jnp.float32)
  own_dot = jnp.sum(grad * o, axis=-1)
  queries = order.split((q, rows[:2]))
  reads = order.split((grad, own_dot, lse))
  zeros = lambda a: jnp.zeros(a.shape, jnp.float32)  # noqa: E731

  def step(carry, number):
    grad_q, grad_bias, grad_kv, travelling = carry
    keys, grad_kv = order.split(travelling), order.split(grad_kv)
    pull = functools.partial(_pull_tile, static)
    nothing = lambda own, other, bias, _: jax.tree.map(zeros, (own[0], other[0], bias))  # noqa: E731
    for i, j, needed in order.tiles(number):
      grads = jax.lax.cond(needed, pull, nothing, queries[i], keys[j], bias, reads[i])
      grad_q[i] += grads[0]
      grad_kv[j] = jax.tree.map(jnp.add, grad_kv[j], grads[1])
      grad_bias = jax.tree.map(jnp.add, grad_bias, grads[2])
    grad_kv = order.join(grad_kv)
    return (grad_q, grad_bias, _pass_on(grad_kv), _pass_on(travelling)), None

  start = ([zeros(own[0]) for own in queries], jax.tree.map(zeros, bias))
  travelling = ((k, v), tuple(rows))
  carry = (*start, jax.tree.map(zeros, (k, v)), travelling)
  (grad_q, grad_bias, grad_kv, _), _ = jax.lax.scan(step, carry, jnp.arange(order.shards))
  grads = order.give((order.join(grad_q), *grad_kv))
  grads = tuple(grad.astype(like.dtype) for grad, like in zip(grads, (q, k, v), strict=True))
  grad_sinks = None
  if sinks_n is not None:
    grad_sinks = -jnp.sum(jnp.exp(sinks_n - lse) * own_dot, axis=(0, 1))
  return grads, jax.lax.psum((grad_bias, grad_sinks), _AXIS)


def _tile(static: _Static, own, other, bias):
  """Queries of one chunk against keys of another: (o_btnh, lse_btn), fp32."""
  q, (q_positions, q_segments) = own
  (k, v), (k_positions, k_segments, prefix_bs) = other
  mask = Mask(q_positions, k_positions, q_segments, k_segments, prefix_bs, static.rule)
  return attend_part(q, k, v, mask, Scores(static.scale, static.softcap, bias), static.block)


def _pull_tile(static: _Static, own, other, bias, reads):
  """Gradients of one tile by its queries, its keys and values, and the bias, in fp32.

  With o = Σ wᵢ oᵢ and wᵢ = exp(lseᵢ - lse): ∂oᵢ = wᵢ ∂o and ∂lseᵢ = wᵢ ∂o·(oᵢ - o).
  """
  grad, own_dot, lse = reads
  tile = lambda q, kv, bias: _tile(static, (q, own[1]), (kv, other[1]), bias)  # noqa: E731
  (o, part_lse), pull = jax.vjp(tile, own[0], other[0], bias)
  weight = jnp.exp(part_lse - lse)
  grads = pull((weight[..., None] * grad, weight * (jnp.sum(grad * o, axis=-1) - own_dot)))
  return jax.tree.map(lambda a: a.astype(jnp.float32), grads)


def _no_part(q_btnh, v_bskh):
  """The result over keys that are all masked."""
  shape = q_btnh.shape[:3]
  return jnp.zeros((*shape, v_bskh.shape[-1]), jnp.float32), jnp.full(shape, _NOTHING)


def _merge(one, two):
  """Combines results over different keys."""
  lse = jnp.logaddexp(one[1], two[1])
  o = sum(o * jnp.exp(part - lse)[..., None] for o, part in (one, two))
  return o, lse


def _pass_on(tree):
  """Sends arrays to the next device of the ring."""
  shards = jax.lax.axis_size(_AXIS)
  return jax.lax.ppermute(tree, _AXIS, [(i, (i + 1) % shards) for i in range(shards)])


class _Order:
  """Which chunks of the row a device holds, and how they get there.

  Args:
    rule: a causal one is balanced.
    length: positions on this device.
    prefix: some keys are seen from everywhere, so no tile may be skipped.
  """

  def __init__(self, rule: MaskSpec, length: int, prefix: bool):
    self.shards = jax.lax.axis_size(_AXIS)
    self.index = jax.lax.axis_index(_AXIS)
    self.pieces = 1 if length % 2 else 2
    self.size = length // self.pieces
    self.balanced = rule.causal and not prefix and self.pieces == 2
    self.rule, self.prefix = rule, prefix

  def ids(self, device) -> tuple:
    """Numbers of a device's chunks within the row."""
    if self.balanced:
      return device, 2 * self.shards - 1 - device
    return tuple(self.pieces * device + i for i in range(self.pieces))

  def tiles(self, number):
    """Yields (query chunk, key chunk, whether they need to meet) of one step of the ring."""
    ids, visiting = self.ids(self.index), self.ids((self.index - number) % self.shards)
    for i, j in itertools.product(range(self.pieces), repeat=2):
      yield i, j, self.needed(ids[i], visiting[j])

  def needed(self, query_id, key_id):
    """Whether any query of one chunk may see any key of another."""
    ok = jnp.bool_(True)
    if self.prefix:
      return ok
    if self.rule.causal:
      ok &= key_id <= query_id
    if self.rule.window:
      ok &= jnp.abs(query_id - key_id) * self.size - (self.size - 1) < self.rule.window
    return ok

  def split(self, tree) -> list:
    """Splits [b, t, …] arrays by chunk."""
    cut = lambda i: jax.tree.map(lambda a: a[:, i * self.size : (i + 1) * self.size], tree)  # noqa: E731
    return [cut(i) for i in range(self.pieces)]

  def join(self, pieces: list):
    """Undoes `split`."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *pieces)

  def take(self, tree):
    """Fetches this device's chunks, from devices that hold consecutive ones."""
    if not self.balanced:
      return tree
    return self.join(self._swap(*self._move(self.split(tree))))

  def give(self, tree):
    """Undoes `take`."""
    if not self.balanced:
      return tree
    return self.join(self._move(self._swap(*self.split(tree)), back=True))

  def _move(self, halves, back: bool = False) -> list:
    """Chunks of even number go one way and those of odd number another: two permutations."""
    moved = []
    for parity, half in enumerate(halves):
      owners = [min(n, 2 * self.shards - 1 - n) for n in range(parity, 2 * self.shards, 2)]
      pairs = [(owner, i) if back else (i, owner) for i, owner in enumerate(owners)]
      moved.append(jax.lax.ppermute(half, _AXIS, pairs))
    return moved

  def _swap(self, one, two) -> tuple:
    """Exchanges both on odd devices, whose early chunk is of odd number."""
    even = self.index % 2 == 0
    pick = lambda a, b: jnp.where(even, a, b)  # noqa: E731
    return jax.tree.map(pick, one, two), jax.tree.map(pick, two, one)
