"""One training step: micro-batches, gradients, optimizer; jitted with explicit shardings."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.parallel.rules import ACTIVATIONS, batch_sharding, check_divides
from llmjax.train.losses import LossConfig, head_loss
from llmjax.train.state import TrainState, train_shardings


def loss_and_grad(
  model, batch: Batch, accumulation: int = 1, loss: LossConfig | None = None, key=None
):
  """Computes the mean loss over a batch and its gradient, a micro-batch at a time.

  Sums are taken over micro-batches and divided once by the batch's whole count, so any
  `accumulation` gives the gradient of the full batch.

  Args:
    model: the model, whose every leaf is differentiated.
    batch: [b, t], b a multiple of `accumulation`.
    accumulation: number of micro-batches.
    loss: terms beside the cross-entropy.
    key: PRNG key of dropout; None drops nothing.
  Returns:
    (cross-entropy in nats a prediction, gradient of the objective shaped as the model, number of
    predictions).
  """
  loss = loss or LossConfig()

  def objective_sum(model, part: Batch, key):
    x_btd, _ = model.hidden(part, key=key)
    total, nll = head_loss(loss, model.head, x_btd, part.targets_bt, part.loss_mask_bt)
    return total, (nll, jnp.sum(part.loss_mask_bt))

  grad = jax.grad(objective_sum, has_aux=True)
  if accumulation == 1:
    grads, (nll, count) = grad(model, batch, key)
  else:

    def add(carry, numbered):
      number, part = numbered
      part_key = None if key is None else jax.random.fold_in(key, number)
      return jax.tree.map(jnp.add, carry, grad(model, part, part_key)), None

    zero = (jax.tree.map(jnp.zeros_like, model), (jnp.float32(0), jnp.float32(0)))
    parts = (jnp.arange(accumulation), micro_batches(batch, accumulation))
    (grads, (nll, count)), _ = jax.lax.scan(add, zero, parts)
  scale = 1 / jnp.maximum(count, 1)
  return nll * scale, jax.tree.map(lambda grad: grad * scale, grads), count


def micro_batches(batch: Batch, parts: int) -> Batch:
  """Divides rows into `parts` groups [parts, b / parts, t], each spread over all devices."""
  return jax.tree.map(
    lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch
  )


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  optimizer,
  accumulation: int = 1,
  loss: LossConfig | None = None,
  seed: int = 0,
):
  """Advances the state by one batch.

  Returns:
    (state, metrics): `loss` in nats a token, `grad_norm` before clipping, `tokens` predicted.
  """
  key = None
  if state.model.config.dropout:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
  nll, grads, count = loss_and_grad(state.model, batch, accumulation, loss, key)
  updates, opt_state = optimizer.update(grads, state.optimizer, state.model)
  model = optax.apply_updates(state.model, updates)
  metrics = {"loss": nll, "grad_norm": optax.tree.norm(grads), "tokens": count}
  return TrainState(state.step + 1, model, opt_state), metrics


def compile_step(
  state: TrainState,
  mesh: Mesh,
  optimizer,
  *,
  accumulation: int,
  batch_size: int,
  loss: LossConfig | None = None,
  seed: int = 0,
):
  """Jits the step for a mesh: state donated, every input and output sharding given.

  Args:
    state: the state, or its description.
    mesh: the run's mesh.
    optimizer: optax transformation.
    accumulation: micro-batches a step.
    batch_size: rows of the global batch.
    loss: terms beside the cross-entropy.
    seed: with the step number, decides what dropout drops.
  Returns:
    `(state, batch) -> (state, metrics)`.
  Raises:
    UserError: the batch does not divide into the micro-batches, or those over the mesh.
  """
  if accumulation < 1 or batch_size % accumulation:
    raise UserError(
      f"data.batch_size {batch_size} is not a multiple of train.accumulation {accumulation}"
    )
  check_divides(mesh, "micro-batch", "b", (batch_size // accumulation,), ACTIVATIONS)
  shardings = train_shardings(mesh, state)

  def step(state, batch):
    return train_step(
      state, batch, optimizer=optimizer, accumulation=accumulation, loss=loss, seed=seed
    )

  return jax.jit(
    step,
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    donate_argnums=0,
  )
