"""What training minimizes: `objective(model, batch, key) → (sum, count, metrics)`, one a task. Sums
are over a batch's predictions, so those of micro-batches add up and are divided once. A new
objective is a function of the head and the final hidden states, named in `OBJECTIVES`."""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.data.batch import Batch
from llmjax.training.head import head_logprobs, head_loss
from llmjax.training.losses import LossConfig, routing_loss


def cross_entropy(config: LossConfig, head, x_btd, batch: Batch):
  """Sums the cross-entropy of a batch's targets and the terms of `LossConfig`.

  Args:
    head: module with `logits(x_btd)`.
    batch: `targets_bt`, and `loss_mask_bt` as the weight of each prediction.
  Returns:
    (sum to be minimized, number of predictions, {"loss": sum of the cross-entropy in nats}).
  """
  total, nll = head_loss(config, head, x_btd, batch.targets_bt, batch.loss_mask_bt)
  return total, jnp.sum(batch.loss_mask_bt), {"loss": nll}


# "": classes of images, which no task makes batches of.
OBJECTIVES = dict.fromkeys(
  ("language_model", "prefix_lm", "masked_lm", "span_corruption", ""), cross_entropy
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """A task's objective, bound to the batch that it is a mean over.

  Attributes:
    task: name in `OBJECTIVES`.
    config: weights of the terms.
    predictions_per_token: of the whole batch. Router losses are means over tokens, and the sum is
      divided by the number of predictions.
  """

  task: str = dataclasses.field(metadata={"static": True})
  config: LossConfig = dataclasses.field(metadata={"static": True})
  predictions_per_token: jax.Array

  def __call__(self, model, batch: Batch, key=None):
    """Runs a model on a batch or a micro-batch.

    Returns:
      (sum to be minimized, number of predictions, metrics: sums by name, `loss` among them, and
      `routing`, the router statistics, of a model with experts).
    """
    x_btd, _, routing = model.hidden(batch, key=key)
    total, count, metrics = self.of_hidden(model.head, x_btd, batch)
    if routing is not None:
      total += self.of_routing(routing)
      metrics |= {"routing": routing}
    return total, count, metrics

  def of_hidden(self, head, x_btd, batch: Batch):
    """Computes what depends on the final hidden states: (sum, count, metrics)."""
    return OBJECTIVES[self.task](self.config, head, x_btd, batch)

  def of_routing(self, routing):
    """Computes what depends on routers alone: a term of the sum."""
    return self.predictions_per_token * routing_loss(self.config, routing)


def make_objective(task: str, config: LossConfig, batch: Batch) -> Objective:
  """Binds a task's objective to the whole batch of a step."""
  predictions = jnp.sum(batch.loss_mask_bt)
  return Objective(task, config, predictions / jnp.maximum(real_tokens(batch), 1))


def real_tokens(batch: Batch):
  """Counts a batch's tokens without padding; of images, its labels."""
  if batch.segments_bt is None:
    return jnp.float32(batch.targets_bt.size)
  return jnp.sum(batch.segments_bt > 0).astype(jnp.float32)


def token_logprobs(model, batch: Batch, chunk: int = 128, key=None):
  """Computes log p(target) at every position: what losses on log-probabilities are functions of.

  Exact and differentiable. Logits exist for `chunk` positions at a time, in both directions, and
  are sharded over the vocabulary where `tensor` is.

  Args:
    chunk: positions of a row, on each device; 0 takes all at once.
  Returns:
    logprobs_bt, fp32, in nats.
  """
  x_btd = model.hidden(batch, key=key)[0]
  return head_logprobs(chunk, model.head, x_btd, batch.targets_bt)
