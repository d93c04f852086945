"""Losses as small pure functions of arrays, returning (sum, count); division happens once."""

import jax.numpy as jnp
import optax

from llmjax.data.batch import Batch


def cross_entropy(logits_btv, batch: Batch):
  """Sums -log p(target) over the predictions that count.

  Args:
    logits_btv: fp32.
    batch: targets and loss mask.
  Returns:
    (sum in nats, number of predictions), fp32 scalars.
  """
  nll_bt = token_nll(logits_btv, batch.targets_bt)
  return jnp.sum(nll_bt * batch.loss_mask_bt), jnp.sum(batch.loss_mask_bt)


def token_nll(logits_btv, targets_bt):
  """Computes -log p(target) at every position: nll_bt in nats, fp32."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_btv, targets_bt)
