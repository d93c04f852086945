"""Losses as pure functions of logits and of router statistics, which return sums."""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.core.choices import check_fields
from llmjax.nn.router import RouterStats
from llmjax.parallel.rules import inside, shards


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimized beside the cross-entropy.

  Attributes:
    z_loss: weight of the squared log of the softmax's normalizer.
    label_smoothing: share of the target's probability that is spread over all tokens.
    chunk: chunk size along the sequence for the cross-entropy; 0 computes all positions at once.
    moe_aux: weight of the load-balancing loss of each layer of experts, over a micro-batch.
    sequence_balance: weight of the same loss over each sequence by itself.
    router_z: weight of the squared log of the normalizer of the router's softmax.
  """

  z_loss: float = 0.0
  label_smoothing: float = 0.0
  chunk: int = 128
  moe_aux: float = 0.01
  sequence_balance: float = 0.0
  router_z: float = 0.0

  def __post_init__(self):
    check_fields(
      "loss", self, z_loss=0, chunk=0, moe_aux=0, sequence_balance=0, router_z=0,
      label_smoothing="[0, 1)",
    )


def token_nll(logits_btv, targets_bt):
  """Computes -log p(target) at every position: nll_bt in nats, fp32."""
  return _log_normalizer(logits_btv) - _target_logit(logits_btv, targets_bt)


def _log_normalizer(logits_btv):
  max_bt1 = jax.lax.stop_gradient(logits_btv).max(-1, keepdims=True)
  if inside("tensor"):
    max_bt1 = jax.lax.pmax(max_bt1, "tensor")
  return jnp.log(_sum_vocabulary(jnp.exp(logits_btv - max_bt1))) + max_bt1[..., 0]


def _target_logit(logits_btv, targets_bt):
  if shards("v") == 1 and not inside("tensor"):
    return jnp.take_along_axis(logits_btv, targets_bt[..., None], axis=-1)[..., 0]
  # Indexing a sharded vocabulary would gather all logits.
  ids_v = jnp.arange(logits_btv.shape[-1])
  if inside("tensor"):
    ids_v += jax.lax.axis_index("tensor") * len(ids_v)
  return _sum_vocabulary(jnp.where(ids_v == targets_bt[..., None], logits_btv, 0))


def _sum_vocabulary(logits_btv):
  """Sums over the vocabulary, of which each device of `tensor` may hold a shard."""
  sum_bt = jnp.sum(logits_btv, axis=-1)
  return _psum_tensor(sum_bt) if inside("tensor") else sum_bt


@jax.custom_vjp
def _psum_tensor(x):
  """Sums over `tensor`; what follows is replicated there, so the gradient is passed on as it is."""
  return jax.lax.psum(x, "tensor")


_psum_tensor.defvjp(lambda x: (_psum_tensor(x), None), lambda _, grad: (grad,))


def logits_loss(logits_btv, targets_bt, weights_bt, config: LossConfig):
  """Sums nll + label_smoothing · (mean over tokens of -log p - nll) + z_loss · log²(Σ exp logits).

  Args:
    logits_btv: fp32.
    weights_bt: fp32 weight of each prediction.
  Returns:
    (sum of the loss, sum of the cross-entropy), fp32 scalars.
  Source: label smoothing: Szegedy et al. 2015, arXiv:1512.00567, sec. 7; z-loss: Chowdhery et al.
    2022, arXiv:2204.02311, sec. 5.
  """
  log_sum_bt = _log_normalizer(logits_btv)
  nll_bt = total_bt = log_sum_bt - _target_logit(logits_btv, targets_bt)
  if config.label_smoothing or config.z_loss:
    tokens = logits_btv.shape[-1] * (jax.lax.axis_size("tensor") if inside("tensor") else 1)
    smooth_bt = log_sum_bt - _sum_vocabulary(logits_btv) / tokens - nll_bt
    total_bt = total_bt + config.label_smoothing * smooth_bt
    total_bt = total_bt + config.z_loss * jnp.square(log_sum_bt)
  return jnp.sum(total_bt * weights_bt), jnp.sum(nll_bt * weights_bt)


def routing_loss(config: LossConfig, routing: RouterStats):
  """Sums the losses of routers, over tokens and over layers.

  Source: balance: Fedus et al. 2021, arXiv:2101.03961, eq. 4; z: Zoph et al. 2022,
    arXiv:2202.08906, eq. 5; of a sequence: DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20.
  """
  return jnp.sum(
    config.moe_aux * routing.balance
    + config.sequence_balance * routing.sequence
    + config.router_z * routing.z
  )
