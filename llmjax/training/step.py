"""One training step: micro-batches, gradients, optimizer; jitted with explicit shardings.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) is a choice of layouts: of the weights between
steps, of the sum of gradients, of the optimizer's state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.data.batch import Batch
from llmjax.parallel.rules import (
  REPLICATED,
  WEIGHTS,
  batch_sharding,
  constrain,
  shard_weights,
  shards,
  weight_shardings,
)
from llmjax.training.config import Config
from llmjax.training.experts import move_biases, routing_metrics
from llmjax.training.losses import LossConfig, head_loss, routing_loss
from llmjax.training.pipelined import PipelineConfig, pipelined_grad
from llmjax.training.runnable import check_mesh
from llmjax.training.state import TrainState, abstract_state, optimizer_of


def loss_and_grad(
  model,
  batch: Batch,
  accumulation: int = 1,
  loss: LossConfig | None = None,
  key=None,
  zero: int = 3,
  pipeline: PipelineConfig | None = None,
  sums: str = "float32",
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
    zero: with 1 gradients are summed whole on every device of `fsdp`, else each sums its part.
    pipeline: how micro-batches go through the stages of a mesh that has several.
    sums: with 3, dtype in which gradients are summed over `fsdp`.
  Returns:
    (cross-entropy in nats a prediction, gradient of the objective shaped as the model, number of
    predictions, what routers did or None).
  """
  loss = loss or LossConfig()
  predictions = jnp.sum(batch.loss_mask_bt)
  # Routers' terms are means over tokens, the loss is one over predictions.
  each = predictions / jnp.maximum(real_tokens(batch), 1)
  table = REPLICATED if zero == 1 else WEIGHTS
  layout = functools.partial(
    shard_weights, table=WEIGHTS if zero == 3 else REPLICATED, reduce_dtype=sums
  )
  if shards("l", WEIGHTS) > 1:
    parts = micro_batches(batch, accumulation)
    grads, nll, routing = pipelined_grad(model, parts, loss, key, pipeline, zero, each, layout)
    grads = constrain(grads, table)
  else:
    grads, (nll, routing) = _summed_grad(
      model, batch, accumulation, loss, key, table, each, layout
    )
  scale = 1 / jnp.maximum(predictions, 1)
  return nll * scale, jax.tree.map(lambda grad: grad * scale, grads), predictions, routing


def _summed_grad(
  model, batch: Batch, accumulation: int, loss: LossConfig, key, table, each, layout
):
  """Adds up over micro-batches: (gradient, (cross-entropy, what routers did))."""

  def objective_sum(model, part: Batch, key):
    model = layout(model)
    x_btd, _, routing = model.hidden(part, key=key)
    total, nll = head_loss(loss, model.head, x_btd, part.targets_bt, part.loss_mask_bt)
    if routing is not None:
      total += each * routing_loss(loss, routing)
    return total, (nll, routing)

  def grad(part, key):
    grads, sums = jax.grad(objective_sum, has_aux=True)(model, part, key)
    return constrain(grads, table), sums

  if accumulation == 1:
    return grad(batch, key)

  def add(carry, numbered):
    number, part = numbered
    part_key = None if key is None else jax.random.fold_in(key, number)
    return jax.tree.map(jnp.add, carry, grad(part, part_key)), None

  parts = micro_batches(batch, accumulation)
  first = jax.tree.map(lambda leaf: leaf[0], parts)
  sums = jax.eval_shape(objective_sum, model, first, key)[1]
  nothing = constrain(jax.tree.map(jnp.zeros_like, model), table)
  start = (nothing, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums))
  return jax.lax.scan(add, start, (jnp.arange(accumulation), parts))[0]


def real_tokens(batch: Batch):
  """Counts a batch's tokens, padding left out."""
  if batch.segments_bt is None:
    return jnp.float32(batch.targets_bt.size)  # images have no tokens
  return jnp.sum(batch.segments_bt > 0).astype(jnp.float32)


def micro_batches(batch: Batch, parts: int) -> Batch:
  """Divides rows into `parts` groups [parts, b / parts, t], each spread over all devices."""
  return jax.tree.map(
    lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch
  )


def advance(state: TrainState, batch: Batch, config: Config, optimizer=None):
  """Advances the state by one batch; leaves it as it is where loss or gradient is not finite.

  Args:
    state: what the step takes.
    batch: [b, t], b a multiple of `config.train.grad_accum_steps`.
    config: the experiment; seed and step decide what dropout drops.
    optimizer: optax transformation, by default the experiment's.
  Returns:
    (state, metrics, gradients before clipping); metrics are `loss` in nats a token, `grad_norm`
    before clipping, `tokens` predicted.
  """
  key = None
  if config.model.dropout or config.model.moe.noisy:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  how = config.train
  nll, grads, count, routing = loss_and_grad(
    state.model, batch, how.grad_accum_steps, config.loss, key, how.zero_stage, config.pipeline,
    how.grad_reduce_dtype,
  )
  # Each device of `fsdp` updates its part, whatever it holds of the weights.
  grads = constrain(grads, WEIGHTS)
  state = dataclasses.replace(state, model=constrain(state.model, WEIGHTS))
  update = (optimizer or optimizer_of(config)).update
  updates, opt_state = update(grads, state.optimizer, state.model)
  model = optax.apply_updates(state.model, updates)
  metrics = {"loss": nll, "grad_norm": optax.tree.norm(grads), "tokens": count}
  if routing is not None:
    model = move_biases(model, routing.load_e, config.optim.bias_rate)
    metrics |= routing_metrics(routing, model)
  finite = jnp.isfinite(nll) & jnp.isfinite(metrics["grad_norm"])
  moved = TrainState(state.step + 1, model, opt_state)
  kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
  return kept, metrics, grads


def compile_step(config: Config, mesh: Mesh, with_grads: bool = False):
  """Jits the step for a mesh: state donated, every input and output sharding given.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    mesh: the run's mesh.
    with_grads: the step also returns the gradients.
  Returns:
    `(state, batch) -> (state, metrics)`, of states as `abstract_state` describes them.
  Raises:
    UserError: the mesh cannot run it; see `check_mesh`.
  """
  check_mesh(config, mesh)
  state = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  out = (shardings, NamedSharding(mesh, PartitionSpec()), weight_shardings(mesh, state.model))
  kept = 3 if with_grads else 2

  def step(state, batch):
    return advance(state, batch, config)[:kept]

  into = (shardings, batch_sharding(mesh))
  return jax.jit(
    step, in_shardings=into, out_shardings=out[:kept], donate_argnums=0,
    compiler_options=compiler_options(mesh, config.train.vmem_mib),
  )


_VMEM_MIB = 20  # as `TrainConfig.vmem_mib` says
_GATHERS = {
  "xla_enable_async_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_prefer_async_allgather_to_allreduce": "true",
  "xla_enable_all_gather_3d_emitter": "true",
}


def compiler_options(mesh: Mesh, vmem_mib: int = 0) -> dict[str, str]:
  """Lists what XLA is told beside the program.

  On TPUs a fusion may use 20 MiB of the fast memory in place of 16: by the compiler's estimate
  large products of a Llama-3-8B step are then a tenth faster, with 24 another 4 %, which take a
  fifth longer to compile. A v4 has less of that memory. Weights are gathered beside other work, as
  they are on a v5e unasked, and over a cube of chips gathered at all in place of summed.

  On a CPU that acts as several devices, instructions keep the order that needs least memory. In
  the order XLA prefers there, which runs many at once, arrays are overwritten before they are read:
  weights came out NaN in six steps of seven where dropout, remat and the ring meet.

  Args:
    mesh: of the devices that the program is for.
    vmem_mib: `train.vmem_mib`.
  """
  device = mesh.abstract_mesh.abstract_device
  if device is not None and device.platform == "cpu" and mesh.size > 1:
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  if device is None or device.platform != "tpu":
    return {}
  old = device.device_kind == "TPU v4"
  vmem_mib = vmem_mib or (0 if old else _VMEM_MIB)
  options = {} if old or device.device_kind == "TPU v5 lite" else _GATHERS
  return options | ({"xla_tpu_scoped_vmem_limit_kib": str(vmem_mib * 1024)} if vmem_mib else {})
