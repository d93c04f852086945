"""From final hidden states to the loss or to log-probabilities, a chunk of positions at a time.
Logits of [b, t, v] never exist, neither forward nor backward."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llmjax.core import tree
from llmjax.core.weight import is_sharded, zero_cotangent
from llmjax.parallel.rules import has_sharded, on_each_device, shard, shards, spec, weight_specs
from llmjax.training.losses import LossConfig, logits_loss, token_nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(config: LossConfig, head, x_btd, targets_bt, weights_bt):
  """Sums the loss of the final hidden states, `config.chunk` positions at a time.

  The gradient is computed in the same pass.

  Args:
    config: weights of the terms, and the chunk size.
    head: module with `logits(x_btd)`; every leaf is differentiated.
    weights_bt: fp32 weight of each prediction; not differentiated.
  Returns:
    (sum of the loss, sum of the cross-entropy), fp32 scalars; only the first has a gradient.
  """

  def add(sums, x, targets, weights):
    return jax.tree.map(jnp.add, sums, logits_loss(head.logits(x), targets, weights, config)), None

  zero = (jnp.float32(0), jnp.float32(0))
  return _scan_chunks(add, zero, config.chunk, shard(x_btd, "btd"), targets_bt, weights_bt)[0]


def _head_loss_forward(config, head, x_btd, targets_bt, weights_bt):
  """With `symbolic_zeros`, so that no gradient is summed of weights that are not trained."""
  trained = _trained(head)
  head, *arrays = _values((head, x_btd, targets_bt, weights_bt))
  sums, grads = _loss_and_grads(config, trained, head, *arrays)
  return sums, (*grads, zero_cotangent(arrays[1]), arrays[2])


def _head_loss_backward(config, residuals, grad):
  grads, grad_x, grad_targets, weights_bt = residuals
  factor = 0.0 if isinstance(grad[0], SymbolicZero) else grad[0]

  def scale(leaf):
    return leaf if leaf.dtype == jax.dtypes.float0 else (leaf * factor).astype(leaf.dtype)

  return *jax.tree.map(scale, (grads, grad_x)), grad_targets, jnp.zeros_like(weights_bt)


head_loss.defvjp(_head_loss_forward, _head_loss_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_logprobs(chunk: int, head, x_btd, targets_bt):
  """Computes log p(target) at every position, `chunk` positions at a time.

  Logits are computed again for the gradient, which is that of a cross-entropy whose weights are
  the incoming gradients.

  Args:
    chunk: positions of a row, on each device; 0 takes all at once.
    head: module with `logits(x_btd)`; every leaf is differentiated.
  Returns:
    logprobs_bt, fp32, in nats.
  """

  def logprobs(head, x_btd, targets_bt):
    head = jax.tree.map(functools.partial(_gathered, x_btd.dtype), head, is_leaf=is_sharded)
    one = lambda _, x, targets: ((), -token_nll(head.logits(x), targets))  # noqa: E731
    return _scan_chunks(one, (), chunk, x_btd, targets_bt)[1]

  return _on_shards(logprobs, head, (shard(x_btd, "btd"), targets_bt), spec("bt"))


def _head_logprobs_forward(chunk, head, x_btd, targets_bt):
  trained = dict.fromkeys(sorted(_trained(head)))  # a tree without leaves
  head, x_btd, targets_bt = _values((head, x_btd, targets_bt))
  return head_logprobs(chunk, head, x_btd, targets_bt), (trained, head, x_btd, targets_bt)


def _head_logprobs_backward(chunk, residuals, grad_bt):
  trained, head, x_btd, targets_bt = residuals
  weights_bt = jnp.zeros(targets_bt.shape, jnp.float32)
  if not isinstance(grad_bt, SymbolicZero):
    weights_bt = -grad_bt
  config = LossConfig(chunk=chunk)
  _, grads = _loss_and_grads(config, set(trained), head, x_btd, targets_bt, weights_bt)
  return *grads, zero_cotangent(targets_bt)


head_logprobs.defvjp(_head_logprobs_forward, _head_logprobs_backward, symbolic_zeros=True)


def _trained(head) -> set[str]:
  """Paths of the weights, among what `symbolic_zeros` gives, that gradients are wanted for."""
  nodes = tree.flatten(head, is_leaf=is_sharded)
  return {
    path for path, node in nodes.items() if any(leaf.perturbed for leaf in jax.tree.leaves(node))
  }


def _values(primals):
  return jax.tree.map(lambda leaf: leaf.value, primals)


def _on_shards(function, head, arrays, out_specs):
  """Calls `function(head, *arrays)`, on every device's shards where `fsdp` shards the head."""
  if not has_sharded(head):
    return function(head, *arrays)
  in_specs = weight_specs(head), *(spec("btd"[: a.ndim]) for a in arrays)
  return on_each_device(function, in_specs, out_specs)(head, *arrays)


def _gathered(dtype, node):
  """A weight of the head, gathered over `fsdp` in the compute dtype, once for all chunks."""
  return node.cast(dtype).decode(node.dtype) if is_sharded(node) else node


def _loss_and_grads(config, trained, head, x_btd, targets_bt, weights_bt):
  """Computes ((loss, cross-entropy), (gradient of the head, of x_btd)) of `head_loss`."""
  specs = tree.flatten(weight_specs(head), is_leaf=is_sharded)
  scalar = PartitionSpec()
  sums, (grads, grad_x) = _on_shards(
    functools.partial(_device_grads, config, trained), head,
    (shard(x_btd, "btd"), targets_bt, weights_bt),
    ((scalar, scalar), ({path: specs[path] for path in trained}, spec("btd"))),
  )
  grads = zero_cotangent(tree.flatten(head, is_leaf=is_sharded)) | grads
  return sums, (tree.unflatten(head, tree.flatten(grads)), grad_x)


def _device_grads(config, trained, head, x_btd, targets_bt, weights_bt):
  """`_loss_and_grads` of one device's examples; sums over devices happen once."""
  nodes = tree.flatten(head, is_leaf=is_sharded)
  gathered = jax.tree.map(functools.partial(_gathered, x_btd.dtype), head, is_leaf=is_sharded)
  sums, (grads, grad_x) = _scan_grads(config, trained, gathered, x_btd, targets_bt, weights_bt)
  if not any(map(is_sharded, nodes.values())):
    return sums, (grads, grad_x)
  batch_axes = ("data", "expert", "context")
  specs = tree.flatten(weight_specs(head), is_leaf=is_sharded)

  def summed(path, grad):
    node, own_spec = nodes[path], specs[path]
    # Each device of `tensor` has logits of its own tokens: what they share is summed over it too.
    shared = () if "tensor" in (own_spec.array if is_sharded(node) else own_spec) else ("tensor",)
    if not is_sharded(node):
      return jax.lax.psum(grad, ("fsdp", *batch_axes, *shared))
    return jax.lax.psum(node.pull(grad, node), (*batch_axes, *shared))

  sums = jax.lax.psum(sums, ("fsdp", *batch_axes))
  grads = {path: summed(path, grad) for path, grad in grads.items()}
  # Together, or the compiler would keep the full gradient until the model's backward pass is done.
  return sums, jax.lax.optimization_barrier((grads, jax.lax.psum(grad_x, "tensor")))


def _scan_grads(config, trained, head, x_btd, targets_bt, weights_bt):
  """Takes each chunk forward and at once backward, for an incoming gradient of one."""
  nodes = tree.flatten(head)

  def add(carry, x, targets, weights):
    def loss(some, x):
      logits_btv = tree.unflatten(head, nodes | some).logits(x)
      return logits_loss(logits_btv, targets, weights, config)

    total, pull, nll = jax.vjp(loss, {path: nodes[path] for path in trained}, x, has_aux=True)
    grads, grad_x = pull(jnp.float32(1))
    return jax.tree.map(jnp.add, carry, (total, nll, grads)), grad_x

  zeros = {path: jnp.zeros_like(nodes[path]) for path in trained}
  carry = (jnp.float32(0), jnp.float32(0), zeros)
  carry, grad_x = _scan_chunks(add, carry, config.chunk, x_btd, targets_bt, weights_bt)
  total, nll, grads = carry
  return (total, nll), (grads, grad_x)


def _scan_chunks(add, carry, chunk: int, *arrays):
  """Folds `add(carry, *chunks) -> (carry, out)` over chunks of the positions of [b, t, …] arrays.
  Full chunks are a loop: unrolled they would all be alive at once (XLA's CPU backend orders them
  so), and be no faster. The remainder is a chunk of its own."""
  t, devices = arrays[0].shape[1], shards("t")
  chunk = devices * (chunk or t)  # of every device's own positions
  if t <= chunk:
    return add(carry, *arrays)
  if devices > 1:  # a chunk takes its share from every device, so nothing has to be sent
    chunk = next(size for size in range(chunk, 0, -devices) if t % size == 0)
  full = t // chunk * chunk
  chunks = tuple(_to_chunks(a[:, :full], chunk, devices) for a in arrays)
  carry, out = jax.lax.scan(lambda carry, one: add(carry, *one), carry, chunks)
  if out is not None:
    out = _from_chunks(out, devices)
  if full < t:
    carry, rest = add(carry, *(a[:, full:] for a in arrays))
    out = None if out is None else jnp.concatenate([out, rest], axis=1)
  return carry, out


def _to_chunks(array, chunk: int, devices: int):
  """[b, t, …] → [t / chunk, b, chunk, …], each chunk with its share of every device's positions."""
  b, t, *rest = array.shape
  array = array.reshape(b, devices, t // chunk, chunk // devices, *rest)
  return jnp.moveaxis(array, 2, 0).reshape(t // chunk, b, chunk, *rest)


def _from_chunks(chunks, devices: int):
  """Inverts `_to_chunks`."""
  count, b, chunk, *rest = chunks.shape
  chunks = chunks.reshape(count, b, devices, chunk // devices, *rest)
  return jnp.moveaxis(chunks, 0, 2).reshape(b, count * chunk, *rest)
