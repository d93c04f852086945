"""One training step: micro-batches, gradients, optimizer; jitted with explicit shardings. ZeRO
(Rajbhandari et al. 2019, arXiv:1910.02054) is a choice of shardings: of the parameters between
steps, of the sum of gradients, of the optimizer's state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.parallel import rules
from llmjax.training.config import Config
from llmjax.training.experts import move_biases, router_biases, routing_metrics
from llmjax.training.objective import Objective, make_objective
from llmjax.training.optimizers import averaged, gradient_point
from llmjax.training.parameters import TrainState, abstract_state, combine, model_of, optimizer_of
from llmjax.training.pipelined import PipelineConfig, pipelined_grad
from llmjax.training.runnable import check_mesh
from llmjax.training.schedules import make_schedule


def loss_and_grad(
  model,
  trainable: dict[str, jax.Array],
  batch: Batch,
  objective: Objective,
  accumulation: int = 1,
  key=None,
  zero: int = 3,
  pipeline: PipelineConfig | None = None,
  reduce_dtype: str = "float32",
):
  """Computes the mean of an objective over a batch and its gradient, a micro-batch at a time.

  Sums are taken over micro-batches and divided once by the batch's total count, so any
  `accumulation` gives the gradient of the full batch.

  Args:
    trainable: those of its parameters that are differentiated, by path.
    batch: [b, t], b a multiple of `accumulation`.
    objective: of this batch, by `make_objective`.
    accumulation: number of micro-batches.
    zero: with 1 every device of `fsdp` sums all gradients, else each sums its shard.
    reduce_dtype: with 3, dtype in which gradients are summed over `fsdp`.
  Returns:
    (metrics, each a mean over predictions, gradients by path, number of predictions, router
    statistics or None).
  """
  table = rules.REPLICATED if zero == 1 else rules.WEIGHTS
  layout = functools.partial(
    rules.shard_weights, table=rules.ZERO[zero], reduce_dtype=reduce_dtype
  )
  if rules.shards("l", rules.WEIGHTS) > 1:
    batches = micro_batches(batch, accumulation)
    grads, count, metrics = pipelined_grad(
      model, trainable, batches, objective, key, pipeline, zero, layout
    )
    grads = rules.constrain(grads, table)
  else:
    grads, count, metrics = _summed_grad(
      model, trainable, batch, objective, accumulation, key, table, layout
    )
  routing = metrics.pop("routing", None)
  scale = lambda leaf: leaf * (1 / jnp.maximum(count, 1))  # noqa: E731
  return jax.tree.map(scale, metrics), jax.tree.map(scale, grads), count, routing


def _summed_grad(model, trainable, batch, objective, accumulation: int, key, table, layout):
  def total(trainable, micro_batch, key):
    total, *others = objective(layout(combine(model, trainable)), micro_batch, key)
    return total, tuple(others)

  def grad(micro_batch, key):
    grads, sums = jax.grad(total, has_aux=True)(trainable, micro_batch, key)
    return rules.constrain(grads, table), *sums

  if accumulation == 1:
    return grad(batch, key)

  def add(carry, numbered):
    number, micro_batch = numbered
    own_key = None if key is None else jax.random.fold_in(key, number)
    return jax.tree.map(jnp.add, carry, grad(micro_batch, own_key)), None

  batches = micro_batches(batch, accumulation)
  sums = jax.eval_shape(total, trainable, jax.tree.map(lambda leaf: leaf[0], batches), key)[1]
  zeros, sums = jax.tree.map(jnp.zeros_like, (trainable, sums))
  start = (rules.constrain(zeros, table), *sums)
  return jax.lax.scan(add, start, (jnp.arange(accumulation), batches))[0]


def micro_batches(batch: Batch, count: int) -> Batch:
  """Divides examples into `count` groups [count, b / count, t], each spread over all devices."""
  return jax.tree.map(
    lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch
  )


def advance(state: TrainState, batch: Batch, config: Config, optimizer=None):
  """Advances the state by one batch; leaves it as it is where loss or gradient is not finite.

  Args:
    batch: [b, t], b a multiple of `config.train.grad_accum_steps`.
    config: the experiment; seed and step decide what dropout drops.
    optimizer: optax transformation, by default the experiment's.
  Returns:
    (state, metrics, gradients by path before clipping); metrics are those of the objective, among
    them `loss` in nats a token, `grad_norm` before clipping, `tokens` predicted, `learning_rate`
    (AdamW's, without the factors of `optim.groups`), and of experts.
  """
  key = None
  if config.model.dropout or config.model.moe.noisy:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  train = config.train
  point = gradient_point(state.optimizer, state.trainable, rules.ZERO[train.zero_stage])
  model = model_of(dataclasses.replace(state, trainable=point), config)
  metrics, grads, count, routing = loss_and_grad(
    model, point, batch,
    make_objective(config.task_name, config.loss, batch),
    train.grad_accum_steps, key, train.zero_stage, config.pipeline, train.grad_reduce_dtype,
  )
  # Each device of `fsdp` updates its shard, even where it holds all of the parameters.
  grads = rules.constrain(grads, rules.WEIGHTS)
  state = dataclasses.replace(state, trainable=rules.constrain(state.trainable, rules.WEIGHTS))
  update = (optimizer or optimizer_of(config)).update
  point = gradient_point(state.optimizer, state.trainable)
  updates, opt_state = update(grads, state.optimizer, point)
  trainable = averaged(opt_state, optax.apply_updates(point, updates))
  rate = make_schedule(config.optim, train.steps, config.optim.learning_rate)(state.step)
  metrics |= {"grad_norm": optax.tree.norm(grads), "tokens": count, "learning_rate": rate}
  if routing is not None:
    biases = router_biases(abstract(config.model))
    trainable = move_biases(trainable, biases, routing.load_e, config.optim.bias_rate)
    metrics |= routing_metrics(routing, [(state.frozen | trainable)[path] for path in biases])
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
  old = (state.step, state.trainable, state.optimizer)
  step, trainable, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), (state.step + 1, trainable, opt_state), old
  )
  return TrainState(step, trainable, state.frozen, opt_state), metrics, grads


def compile_step(config: Config, mesh: Mesh, with_grads: bool = False):
  """Jits the step for a mesh: state donated, every input and output sharding given.

  Args:
    with_grads: the step also returns the gradients.
  Returns:
    `(state, batch) -> (state, metrics)`, of states as `abstract_state` describes them.
  Raises:
    UserError: the mesh cannot run it; see `check_mesh`.
  """
  check_mesh(config, mesh)
  state = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  grads = rules.weight_shardings(mesh, state.trainable)
  out = shardings, NamedSharding(mesh, PartitionSpec()), grads
  kept = 3 if with_grads else 2

  def step(state, batch):
    return advance(state, batch, config)[:kept]

  into = (shardings, rules.batch_sharding(mesh))
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
  """Chooses XLA's options for a program on a mesh.

  On TPUs a fusion may use 20 MiB of VMEM instead of 16: by the compiler's estimate large products
  of a Llama-3-8B step are then a tenth faster, with 24 another 4 %, and compilation takes a fifth
  longer. A v4 has less VMEM. All-gathers of weights are asynchronous, as they are on a v5e by
  default, and over a cube of chips are not replaced by all-reduces.

  On a CPU with several devices instructions are scheduled for the least memory. With XLA's default
  concurrent scheduler arrays are overwritten before they are read: weights were NaN in six steps
  of seven with dropout, remat and ring attention.
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
