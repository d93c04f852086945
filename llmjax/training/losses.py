"""Losses as small pure functions of arrays, returning sums and a count; division happens once.

`head_loss` goes from the residual stream to the loss a chunk of positions at a time, and computes
its gradient in the same pass, so that [b, t, v] logits never exist.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llmjax.core import tree
from llmjax.core.choices import check_least
from llmjax.core.errors import UserError
from llmjax.core.weight import ShardedWeight, zero_cotangent
from llmjax.nn.router import RouterStats
from llmjax.parallel.rules import (
  ACTIVATIONS,
  has_sharded,
  inside,
  shard,
  shards,
  spec,
  weight_specs,
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimized beside the cross-entropy.

  Attributes:
    z_loss: weight of the squared log of the softmax's sum.
    label_smoothing: share of the target's probability that is spread over all tokens.
    chunk: positions of a row whose logits exist at a time; 0 means all.
    moe_aux: weight of the load-balancing loss of each layer of experts, over a micro-batch.
    sequence_balance: weight of the same over each row by itself.
    router_z: weight of the squared log of the router's softmax's sum.
  """

  z_loss: float = 0.0
  label_smoothing: float = 0.0
  chunk: int = 128
  moe_aux: float = 0.01
  sequence_balance: float = 0.0
  router_z: float = 0.0

  def __post_init__(self):
    check_least(
      "loss", self, z_loss=0, chunk=0, moe_aux=0, sequence_balance=0, router_z=0
    )
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f"loss.label_smoothing {self.label_smoothing} is not in [0, 1)")


def token_nll(logits_btv, targets_bt):
  """Computes -log p(target) at every position: nll_bt in nats, fp32."""
  return _log_sum(logits_btv) - _target(logits_btv, targets_bt)


def _log_sum(logits_btv):
  """log Σ exp over all tokens."""
  high_bt1 = jax.lax.stop_gradient(logits_btv).max(-1, keepdims=True)
  if inside("tensor"):
    high_bt1 = jax.lax.pmax(high_bt1, "tensor")
  return jnp.log(_over_tokens(jnp.exp(logits_btv - high_bt1))) + high_bt1[..., 0]


def _target(logits_btv, targets_bt):
  """Each position's logit of its target."""
  if shards("v", ACTIVATIONS) == 1 and not inside("tensor"):
    return jnp.take_along_axis(logits_btv, targets_bt[..., None], axis=-1)[..., 0]
  # Looking one up in a vocabulary that is cut would gather all logits.
  numbers = jnp.arange(logits_btv.shape[-1])
  if inside("tensor"):
    numbers += jax.lax.axis_index("tensor") * len(numbers)
  return _over_tokens(jnp.where(numbers == targets_bt[..., None], logits_btv, 0))


def _over_tokens(logits_btv):
  """Sums over all tokens, of which each device of `tensor` may hold a part."""
  own_bt = jnp.sum(logits_btv, axis=-1)
  return _added(own_bt) if inside("tensor") else own_bt


@jax.custom_vjp
def _added(x):
  """The sum over `tensor`; every device goes on alike with it, so its gradient is its own."""
  return jax.lax.psum(x, "tensor")


_added.defvjp(lambda x: (_added(x), None), lambda _, grad: (grad,))


def objective(logits_btv, targets_bt, weights_bt, config: LossConfig):
  """Sums the training objective of logits that exist.

  nll + label_smoothing · (mean over tokens of -log p - nll) + z_loss · log²(Σ exp logits).

  Args:
    logits_btv: fp32.
    targets_bt: int32.
    weights_bt: fp32 weight of each prediction.
    config: weights of the terms.
  Returns:
    (objective sum, cross-entropy sum), fp32 scalars.
  Source: label smoothing: Szegedy et al. 2015, arXiv:1512.00567, sec. 7; z-loss: Chowdhery et al.
    2022, arXiv:2204.02311, sec. 5.
  """
  log_sum_bt = _log_sum(logits_btv)
  nll_bt = total_bt = log_sum_bt - _target(logits_btv, targets_bt)
  if config.label_smoothing or config.z_loss:
    tokens = logits_btv.shape[-1] * (jax.lax.axis_size("tensor") if inside("tensor") else 1)
    smooth_bt = log_sum_bt - _over_tokens(logits_btv) / tokens - nll_bt
    total_bt = total_bt + config.label_smoothing * smooth_bt
    total_bt = total_bt + config.z_loss * jnp.square(log_sum_bt)
  return jnp.sum(total_bt * weights_bt), jnp.sum(nll_bt * weights_bt)


def routing_loss(config: LossConfig, routing: RouterStats):
  """Adds up what keeps routers balanced, a sum over tokens and over layers.

  Source: balance: Fedus et al. 2021, arXiv:2101.03961, eq. 4; z: Zoph et al. 2022,
    arXiv:2202.08906, eq. 5; of a row: DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20.
  """
  return jnp.sum(
    config.moe_aux * routing.balance
    + config.sequence_balance * routing.sequence
    + config.router_z * routing.z
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(config: LossConfig, head, x_btd, targets_bt, weights_bt):
  """Sums the training objective from the residual stream, `config.chunk` positions at a time.

  Args:
    config: weights of the terms, and the chunk.
    head: module with `logits(x_btd)`; every leaf is differentiated.
    x_btd: the last norm's result.
    targets_bt: int32.
    weights_bt: fp32 weight of each prediction; not differentiated.
  Returns:
    (objective sum, cross-entropy sum), fp32 scalars; the gradient is the first one's and exact.
  """

  x_btd = shard(x_btd, "btd")

  def add(sums, x, targets, weights):
    part = objective(head.logits(x), targets, weights, config)
    return jax.tree.map(jnp.add, sums, part), None

  zero = (jnp.float32(0), jnp.float32(0))
  return _fold(add, zero, config.chunk, x_btd, targets_bt, weights_bt)[0]


def _head_loss_forward(config, head, x_btd, targets_bt, weights_bt):
  """With `symbolic_zeros`, so that no gradient is summed of weights that are not trained."""
  nodes = tree.flatten(head, is_leaf=_is_sharded)
  trained = {
    path for path, node in nodes.items() if any(leaf.perturbed for leaf in jax.tree.leaves(node))
  }
  values = lambda primals: jax.tree.map(lambda leaf: leaf.value, primals)  # noqa: E731
  head, x_btd, targets_bt, weights_bt = map(values, (head, x_btd, targets_bt, weights_bt))
  x_btd = shard(x_btd, "btd")
  if has_sharded(head):
    mesh = jax.sharding.get_abstract_mesh()
    specs = weight_specs(head)
    by_path = tree.flatten(specs, is_leaf=_is_sharded)
    batch_specs = (spec("btd", ACTIVATIONS), spec("bt", ACTIVATIONS), spec("bt", ACTIVATIONS))
    sums, (grads, grad_x) = jax.shard_map(
      functools.partial(_on_device, config, trained),
      in_specs=(specs, *batch_specs),
      out_specs=(
        (PartitionSpec(), PartitionSpec()), ({p: by_path[p] for p in trained}, batch_specs[0])
      ),
      axis_names={axis for axis in mesh.axis_names if not inside(axis)},
      check_vma=False,
    )(head, x_btd, targets_bt, weights_bt)
  else:
    sums, (grads, grad_x) = _with_gradients(config, trained, head, x_btd, targets_bt, weights_bt)
  nodes = tree.flatten(head, is_leaf=_is_sharded)
  return sums, (zero_cotangent(nodes) | grads, grad_x, zero_cotangent(targets_bt), weights_bt, head)


def _is_sharded(node) -> bool:
  return isinstance(node, ShardedWeight)


def _on_device(config, trained, head, x_btd, targets_bt, weights_bt):
  """A device's own rows: its head gathered once, whose gradient is summed over devices once."""
  rows = ("data", "expert", "context")
  nodes = tree.flatten(head, is_leaf=_is_sharded)

  def gathered(node):
    return node.cast(x_btd.dtype).decode(node.dtype) if _is_sharded(node) else node

  def summed(path, grad):
    if not _is_sharded(nodes[path]):
      return jax.lax.psum(grad, ("fsdp", *rows))
    return jax.lax.psum(nodes[path].pull(grad, nodes[path]), rows)

  head = jax.tree.map(gathered, head, is_leaf=_is_sharded)
  sums, (grads, grad_x) = _with_gradients(config, trained, head, x_btd, targets_bt, weights_bt)
  sums = jax.lax.psum(sums, ("fsdp", *rows))
  grads = {path: summed(path, grad) for path, grad in grads.items()}
  # Together, or the compiler would keep the whole gradient until the model's backward pass is done.
  return sums, jax.lax.optimization_barrier((grads, jax.lax.psum(grad_x, "tensor")))


def _with_gradients(config, trained, head, x_btd, targets_bt, weights_bt):
  """Takes each chunk forward and at once backward, for an incoming gradient of one."""
  nodes = tree.flatten(head)

  def add(carry, x, targets, weights):
    def loss(some, x):
      logits_btv = tree.unflatten(head, nodes | some).logits(x)
      return objective(logits_btv, targets, weights, config)

    total, pull, nll = jax.vjp(loss, {path: nodes[path] for path in trained}, x, has_aux=True)
    grads, grad_x = pull(jnp.float32(1))
    return jax.tree.map(jnp.add, carry, (total, nll, grads)), grad_x

  zeros = {path: jnp.zeros_like(nodes[path]) for path in trained}
  carry = (jnp.float32(0), jnp.float32(0), zeros)
  carry, grad_x = _fold(add, carry, config.chunk, x_btd, targets_bt, weights_bt)
  total, nll, grads = carry
  return (total, nll), (grads, grad_x)


def _head_loss_backward(config, residuals, grad):
  grads, grad_x, grad_targets, weights_bt, head = residuals
  factor = 0.0 if isinstance(grad[0], SymbolicZero) else grad[0]

  def scale(leaf):
    return leaf if leaf.dtype == jax.dtypes.float0 else (leaf * factor).astype(leaf.dtype)

  grads, grad_x = jax.tree.map(scale, (grads, grad_x))
  return tree.unflatten(head, tree.flatten(grads)), grad_x, grad_targets, jnp.zeros_like(weights_bt)


head_loss.defvjp(_head_loss_forward, _head_loss_backward, symbolic_zeros=True)


def _fold(add, carry, chunk: int, *arrays):
  """Folds `add(carry, *pieces) -> (carry, out)` over runs of `chunk` positions of [b, t, …] arrays.

  The whole runs are a loop: written out they would all be alive at once (XLA's CPU backend orders
  them so), and no faster. What is left over is a run by itself.
  """
  t, parts = arrays[0].shape[1], shards("t", ACTIVATIONS)
  chunk = parts * (chunk or t)  # of every device's own positions
  if t <= chunk:
    return add(carry, *arrays)
  if parts > 1:  # a run takes its part from every device, so none has to be sent
    chunk = next(size for size in range(chunk, 0, -parts) if t % size == 0)
  whole = t // chunk * chunk
  runs = tuple(_cut(a[:, :whole], chunk) for a in arrays)
  carry, out = jax.lax.scan(lambda carry, run: add(carry, *run), carry, runs)
  if out is not None:
    out = _joined(out)
  if whole < t:
    carry, rest = add(carry, *(a[:, whole:] for a in arrays))
    out = None if out is None else jnp.concatenate([out, rest], axis=1)
  return carry, out


def _cut(array, chunk: int):
  """Cuts [b, t, …] into runs [t / chunk, b, chunk, …], each with its part of every device's t."""
  b, t, *rest = array.shape
  parts = shards("t", ACTIVATIONS)
  array = array.reshape(b, parts, t // chunk, chunk // parts, *rest)
  return jnp.moveaxis(array, 2, 0).reshape(t // chunk, b, chunk, *rest)


def _joined(runs):
  """Undoes `_cut`."""
  count, b, chunk, *rest = runs.shape
  parts = shards("t", ACTIVATIONS)
  runs = runs.reshape(count, b, parts, chunk // parts, *rest)
  return jnp.moveaxis(runs, 0, 2).reshape(b, count * chunk, *rest)
