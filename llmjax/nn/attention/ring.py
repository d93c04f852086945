"""Ring attention: each device keeps its queries while keys and values travel along `context`. A row
is split into twice as many chunks as devices, c. Under a causal mask device i takes chunks i and
2c - 1 - i, so every device computes two of a step's four tiles. Memory is O(t / c)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmjax.nn.attention.kernels import attend_partially
from llmjax.nn.attention.mask import Mask, MaskSpec
from llmjax.nn.attention.scores import Scores
from llmjax.parallel.rules import on_each_device

_AXIS = "context"
_SHARDED, _REPLICATED = PartitionSpec(None, _AXIS), PartitionSpec()
_MASKED = jnp.finfo(jnp.float32).min


def ring_attend(q_btnh, k_btkh, v_btkh, mask: Mask, scores: Scores, block: int):
  """Computes attention of rows whose positions are sharded along `context`.

  Args:
    q_btnh: queries, sharded along t; keys and values likewise.
    mask: an aligned one.
    block: queries of a tile that are scored at a time.
  Returns:
    o_btnh, dtype of `q_btnh`.
  Source: Liu et al. 2023, arXiv:2310.01889; order of chunks: Brandon et al. 2023,
    arXiv:2311.09431, and Llama 3, arXiv:2407.21783, sec. 3.3.2.
  """
  static = mask.rule, dataclasses.replace(scores, bias=None, sinks_n=None), block
  ids = (mask.q_positions_bt, mask.q_segments_bt, mask.prefix_bs)
  o_btnh = _ring(static, (q_btnh, k_btkh, v_btkh), (scores.bias, scores.sinks_n), ids)
  return checkpoint_name(o_btnh, "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, qkv, extra, ids):
  return _ring_forward(static, qkv, extra, ids)[0]


def _ring_forward(static, qkv, extra, ids):
  out, saved = _on_ring(_forward, static, (_SHARDED, _SHARDED))(qkv, extra, ids)
  return out, (saved, extra)


def _ring_backward(static, residuals, grad):
  return *_on_ring(_backward, static, (_SHARDED, _REPLICATED))(*residuals, grad), None


_ring.defvjp(_ring_forward, _ring_backward)


def _on_ring(function, static, out_specs):  # batch and heads are left to the compiler
  in_specs = _SHARDED, _REPLICATED, _SHARDED
  return on_each_device(functools.partial(function, static), in_specs, out_specs, _AXIS)


def _forward(static, qkv, extra, ids):
  """Runs on one device: (o_btnh, residuals of the backward pass, in the order of chunks)."""
  order = _ChunkOrder(static[0], qkv[0].shape[1], ids[2] is not None)
  (q, k, v), ids = order.balance((qkv, ids))
  bias, sinks_n = extra
  queries = order.split((q, ids[:2]))
  tile = functools.partial(_tile, static)
  masked = lambda queries, keys, _: _masked_result(queries[0], keys[0][1])  # noqa: E731

  def step(carry, number):
    results, travelling = carry
    keys = order.split(travelling)
    for i, j, needed in order.tiles(number):
      result = jax.lax.cond(needed, tile, masked, queries[i], keys[j], bias)
      results[i] = _merge(results[i], result)
    return (results, _to_next_device(travelling)), None

  start = [_masked_result(q_chunk, v) for q_chunk, _ in queries]
  (results, _), _ = jax.lax.scan(step, (start, ((k, v), ids)), jnp.arange(order.shards))
  o, lse = order.join(results)
  if sinks_n is not None:
    with_sink = jnp.logaddexp(lse, sinks_n)
    o, lse = o * jnp.exp(lse - with_sink)[..., None], with_sink
  o = o.astype(q.dtype)
  return order.unbalance(o), (q, k, v, o, lse, *ids)


def _backward(static, saved, extra, grad):
  """Runs on one device: gradients ((dq, dk, dv), (bias, sinks))."""
  q, k, v, o, lse, *ids = saved
  bias, sinks_n = extra
  order = _ChunkOrder(static[0], q.shape[1], ids[2] is not None)
  grad = order.balance(grad).astype(jnp.float32)
  grad_dot_o = jnp.sum(grad * o, axis=-1)
  queries = order.split((q, ids[:2]))
  saved = order.split((grad, grad_dot_o, lse))
  zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)  # noqa: E731
  pull = functools.partial(_pull_tile, static)
  masked = lambda queries, keys, bias, _: zeros((queries[0], keys[0], bias))  # noqa: E731

  def step(carry, number):
    grad_q, grad_bias, grad_kv, travelling = carry
    keys, grad_kv = order.split(travelling), order.split(grad_kv)
    for i, j, needed in order.tiles(number):
      grads = jax.lax.cond(needed, pull, masked, queries[i], keys[j], bias, saved[i])
      grad_q[i] += grads[0]
      grad_kv[j] = jax.tree.map(jnp.add, grad_kv[j], grads[1])
      grad_bias = jax.tree.map(jnp.add, grad_bias, grads[2])
    grad_kv = order.join(grad_kv)
    return (grad_q, grad_bias, _to_next_device(grad_kv), _to_next_device(travelling)), None

  carry = (zeros([chunk for chunk, _ in queries]), *zeros((bias, (k, v))), ((k, v), tuple(ids)))
  (grad_q, grad_bias, grad_kv, _), _ = jax.lax.scan(step, carry, jnp.arange(order.shards))
  grads = order.unbalance((order.join(grad_q), *grad_kv))
  grads = tuple(grad.astype(like.dtype) for grad, like in zip(grads, (q, k, v), strict=True))
  grad_sinks = None
  if sinks_n is not None:
    grad_sinks = -jnp.sum(jnp.exp(sinks_n - lse) * grad_dot_o, axis=(0, 1))
  return grads, jax.lax.psum((grad_bias, grad_sinks), _AXIS)


def _tile(static, queries, keys, bias):
  rule, scores, block = static
  q, (q_positions, q_segments) = queries
  (k, v), (k_positions, k_segments, prefix_bs) = keys
  mask = Mask(q_positions, k_positions, q_segments, k_segments, prefix_bs, rule)
  return attend_partially(q, k, v, mask, dataclasses.replace(scores, bias=bias), block)


def _pull_tile(static, queries, keys, bias, saved):
  """Gradients of one tile by its queries, its keys and values, and the bias, in fp32. With
  o = Σ wᵢ oᵢ and wᵢ = exp(lseᵢ - lse): ∂oᵢ = wᵢ ∂o and ∂lseᵢ = wᵢ ∂o·(oᵢ - o)."""
  grad, grad_dot_o, lse = saved
  tile = lambda q, kv, bias: _tile(static, (q, queries[1]), (kv, keys[1]), bias)  # noqa: E731
  (o, tile_lse), pull = jax.vjp(tile, queries[0], keys[0], bias)
  weight = jnp.exp(tile_lse - lse)
  grads = pull((weight[..., None] * grad, weight * (jnp.sum(grad * o, axis=-1) - grad_dot_o)))
  return jax.tree.map(lambda a: a.astype(jnp.float32), grads)


def _masked_result(q_btnh, v_bskh):
  """(o, lse) where all keys are masked."""
  shape = q_btnh.shape[:3]
  return jnp.zeros((*shape, v_bskh.shape[-1]), jnp.float32), jnp.full(shape, _MASKED)


def _merge(*results):
  lse = jnp.logaddexp(*(each for _, each in results))
  return sum(o * jnp.exp(each - lse)[..., None] for o, each in results), lse


def _to_next_device(tree):
  shards = jax.lax.axis_size(_AXIS)
  return jax.lax.ppermute(tree, _AXIS, [(i, (i + 1) % shards) for i in range(shards)])


class _ChunkOrder:
  """Which chunks of the row a device holds, and how they get there.

  Args:
    rule: a causal one is balanced.
    length: positions on this device.
    prefix: some keys are seen from everywhere, so no tile may be skipped.
  """

  def __init__(self, rule: MaskSpec, length: int, prefix: bool):
    self.shards = jax.lax.axis_size(_AXIS)
    self.index = jax.lax.axis_index(_AXIS)
    self.chunks = 1 if length % 2 else 2
    self.size = length // self.chunks
    self.balanced = rule.causal and not prefix and self.chunks == 2
    self.rule, self.prefix = rule, prefix

  def ids(self, device) -> tuple:
    """Numbers of a device's chunks within the row."""
    if self.balanced:
      return device, 2 * self.shards - 1 - device
    return tuple(self.chunks * device + i for i in range(self.chunks))

  def tiles(self, number):
    """Yields (query chunk, key chunk, whether to compute them) of one step of the ring."""
    ids, visiting = self.ids(self.index), self.ids((self.index - number) % self.shards)
    for i, j in itertools.product(range(self.chunks), repeat=2):
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
    chunk = lambda i: jax.tree.map(lambda a: a[:, i * self.size : (i + 1) * self.size], tree)  # noqa: E731
    return [chunk(i) for i in range(self.chunks)]

  def join(self, chunks: list):
    """Undoes `split`."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *chunks)

  def balance(self, tree):
    """Fetches this device's chunks, from devices that hold consecutive ones."""
    return self.join(self._swap(*self._permute(self.split(tree)))) if self.balanced else tree

  def unbalance(self, tree):
    """Undoes `balance`."""
    if not self.balanced:
      return tree
    return self.join(self._permute(self._swap(*self.split(tree)), back=True))

  def _permute(self, halves, back: bool = False) -> list:
    """Sends chunks of even number by one permutation and those of odd number by another."""
    sent = []
    for parity, half in enumerate(halves):
      owners = [min(n, 2 * self.shards - 1 - n) for n in range(parity, 2 * self.shards, 2)]
      pairs = [(owner, i) if back else (i, owner) for i, owner in enumerate(owners)]
      sent.append(jax.lax.ppermute(half, _AXIS, pairs))
    return sent

  def _swap(self, one, two) -> tuple:
    """Exchanges the chunks of odd devices, whose early chunk has an odd number."""
    even = self.index % 2 == 0
    pick = lambda a, b: jnp.where(even, a, b)  # noqa: E731
    return jax.tree.map(pick, one, two), jax.tree.map(pick, two, one)
