"""The gradient on a mesh with `stage`: the model as the chunks of a pipeline. The first virtual
stage embeds, the last has the head. Every stage holds the parameters outside the layers; their
gradients are summed over stages, so that tied ones get both."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from llmjax.core import tree
from llmjax.core.choices import check_fields
from llmjax.core.dims import letters_of
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.depth import Group, count, run_layers
from llmjax.parallel.pipeline import leaves_read, run_pipeline
from llmjax.parallel.rules import ZERO, on_each_device, spec
from llmjax.parallel.schedules import KINDS, check_numbers, make_schedule
from llmjax.training.objective import Objective


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How microbatches go through the stages; there are `train.grad_accum_steps` of them.

  Attributes:
    schedule: gpipe, 1f1b, interleaved, zb_h1.
    chunks: virtual stages on each stage; more than 1 is interleaved.
  """

  schedule: str = "1f1b"
  chunks: int = 1

  def __post_init__(self):
    check_fields("pipeline", self, schedule=KINDS, chunks=1)


def check_stages(kind: str, stages: int, microbatches: int, config: PipelineConfig):
  """Raises a `UserError` where a kind of model has no pipeline, or a schedule not such numbers."""
  if kind not in ("decoder", "encoder"):
    raise UserError(f"mesh.stage cuts decoders and encoders, not model.kind={kind}")
  check_numbers(config.schedule, stages, microbatches, config.chunks)


def pipelined_grad(
  model, trainable: dict, batches: Batch, objective: Objective, key=None,
  config: PipelineConfig | None = None, zero: int = 3, layout: Callable = lambda weights: weights,
):
  """Computes the sum of an objective's gradients over microbatches.

  Args:
    model: a decoder or an encoder, on a mesh whose `stage` is more than 1.
    trainable: those of its parameters that are differentiated, by path.
    batches: [m, b, t] microbatches.
    objective: of the whole batch.
    key: PRNG key of dropout; microbatch i draws from `fold_in(key, i)`.
    zero: with 3 weights are sharded over `fsdp` in the stages as well.
    layout: marks the weights that `fsdp` shards; see `shard_weights`.
  Returns:
    (gradients by path, number of predictions, metrics: sums by name).
  Raises:
    UserError: a kind of model that has no pipeline, or numbers that its schedule cannot take.
  """
  config = config or PipelineConfig()
  stages = jax.sharding.get_abstract_mesh().shape["stage"]
  microbatches = len(jax.tree.leaves(batches)[0])
  check_stages(model.config.kind, stages, microbatches, config)
  schedule = make_schedule(config.schedule, stages, microbatches, config.chunks)
  layers, table = count(model.stack.blocks), ZERO[zero]
  assignment = StageAssignment(layers, stages, config.chunks, table)
  prefix = f"{model.config.kind}/blocks/"
  blocks, outer = _divide(trainable, prefix)
  leaves = {path: leaf for path, leaf in tree.flatten(model).items() if path not in trainable}
  frozen_blocks, frozen_outer = _divide(leaves, prefix)
  single, remat = key is not None and microbatches == 1, config.schedule != "zb_h1"
  shapes = jax.eval_shape(lambda: model)
  shell, stack = copy.copy(shapes), copy.copy(shapes.stack)
  stack.blocks = nnx.data(())
  setattr(shell, model.config.kind, stack)
  make_chunk = functools.partial(_Chunk, shapes, shell, assignment, layout, single, remat)
  by_stage, replicated = PartitionSpec("stage"), PartitionSpec()
  run = on_each_device(
    functools.partial(_run_stage, schedule, make_chunk),
    (by_stage, by_stage, replicated, replicated), (by_stage, replicated, replicated), "stage",
  )
  dealt, pull = jax.vjp(assignment.to_stages, blocks)
  block_grads, outer_grads, (predictions, metrics) = run(
    dealt, assignment.to_stages(frozen_blocks), outer, (batches, key, objective, frozen_outer)
  )
  if "routing" in metrics:
    metrics["routing"] = jax.tree.map(lambda leaf: leaf[:layers], metrics["routing"])
  block_grads = {prefix + path: grad for path, grad in pull(block_grads)[0].items()}
  return {path: (block_grads | outer_grads)[path] for path in trainable}, predictions, metrics


def _run_stage(schedule, make_chunk: Callable, blocks, frozen_blocks, outer, inputs):
  blocks, frozen_blocks = jax.tree.map(lambda leaf: leaf[0], (blocks, frozen_blocks))
  chunk = make_chunk(*inputs, frozen_blocks)
  config, (b, t) = chunk.model.config, chunk.batches.tokens_bt.shape[1:]
  x = jax.ShapeDtypeStruct((b, t, config.width), jnp.dtype(config.dtype))
  first = jax.tree.map(lambda leaf: leaf[0], blocks)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  sums = jax.eval_shape(chunk, first, outer, x, number, number)[2]
  read = leaves_read(functools.partial(chunk.layer_inputs, microbatch=0), outer)
  totals = run_pipeline(schedule, chunk, blocks, outer, x, sums, read)
  outer_grads, sums = jax.lax.psum((totals.outer, totals.sums), "stage")
  return jax.tree.map(lambda leaf: leaf[None], totals.weights), outer_grads, sums


def _divide(leaves: dict, prefix: str) -> tuple[dict, dict]:
  """Divides parameters by path into (those of stacked blocks, without the prefix; all others)."""
  blocks = {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}
  others = {path: leaf for path, leaf in leaves.items() if path not in blocks}
  return {path.removeprefix(prefix): leaf for path, leaf in blocks.items()}, others


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
  """What a virtual stage does to a microbatch: its layers, and at the ends embedding or loss.

  Attributes:
    model: abstract, gives the structure.
    shell: the same without the stacked blocks of its stack.
    assignment: of layers to stages.
    layout: marks the weights that `fsdp` shards.
    single: there is one microbatch, which draws as a step without microbatches does.
    remat: layers are computed again in the backward pass.
    batches: [m, b, t]; like what follows, read and not differentiated.
    frozen_blocks: [chunk, layer, …] of this stage.
  """

  model: nnx.Module
  shell: nnx.Module
  assignment: "StageAssignment"
  layout: Callable
  single: bool
  remat: bool
  batches: Batch
  key: jax.Array | None
  objective: Objective
  frozen_outer: dict
  frozen_blocks: dict

  def __call__(self, blocks, outer, x_btd, virtual, microbatch):
    """Returns (x_btd, sum of the objective, (number of predictions, metrics))."""
    assignment, objective = self.assignment, self.objective
    batch, key = self._microbatch(microbatch)
    model = self.layout(tree.unflatten(self.shell, outer | self.frozen_outer))
    before = self.model.stack.groups[-1].start  # layers that run with the embedding
    layer_inputs = model.layer_inputs(batch, key)

    def embed(x_btd):
      x_btd = model.embed_tokens(batch, key)
      return run_layers(model.stack.groups, x_btd, layer_inputs, model.config)[0]

    x_btd = jax.lax.cond(virtual == 0, embed, lambda x: x, x_btd)
    frozen = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, virtual // assignment.stages, 0, False),
      self.frozen_blocks,
    )
    blocks = self.layout(tree.unflatten(self.model.stack.blocks, blocks | frozen))
    numbers = tuple(tuple(before + n for n in each) for each in assignment.numbers)
    first = before + virtual * assignment.per_stage
    group = Group(blocks, first, numbers, before + assignment.layers)
    config = dataclasses.replace(model.config, scan=False)
    if not self.remat:
      config = dataclasses.replace(config, remat="none")
    x_btd, _, routing = run_layers((group,), x_btd, layer_inputs, config)

    def loss(x_btd):
      return objective.of_hidden(model.head, model.final_norm(x_btd), batch)

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss, x_btd))
    last = virtual == assignment.virtual - 1
    total, predictions, metrics = jax.lax.cond(last, loss, lambda x: zeros, x_btd)
    if routing is not None:
      total += objective.of_routing(routing)
      routing = jax.tree.map(functools.partial(assignment.among_all, virtual), routing)
      metrics |= {"routing": routing}
    return x_btd, total, (predictions, metrics)

  def layer_inputs(self, outer, microbatch):
    """Makes the inputs that are the same for the layers of every virtual stage."""
    model = tree.unflatten(self.shell, outer | self.frozen_outer)
    return model.layer_inputs(*self._microbatch(microbatch))

  def _microbatch(self, number):
    batch = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, 0, False), self.batches)
    key = self.key
    return batch, key if key is None or self.single else jax.random.fold_in(key, number)


class StageAssignment:
  """Which layers each stage has: virtual stage v = chunk · stages + stage has `per_stage` of them.

  They are layers v · per_stage and on.
  """

  def __init__(self, layers: int, stages: int, chunks: int, table: dict):
    self.layers, self.stages, self.chunks, self.table = layers, stages, chunks, table
    self.virtual = stages * chunks
    self.per_stage = math.ceil(layers / self.virtual)
    self.numbers = [
      [v * self.per_stage + i for v in range(self.virtual)] for i in range(self.per_stage)
    ]

  def among_all(self, virtual, stats):
    """Pads what a virtual stage's layers returned, [layer, …], with zeros for all other layers."""
    padded = jnp.zeros((self.virtual * self.per_stage, *stats.shape[1:]), stats.dtype)
    return jax.lax.dynamic_update_slice_in_dim(padded, stats, virtual * self.per_stage, 0)

  def to_stages(self, blocks: dict) -> dict:
    """Reshapes stacked layers [l, …] to [stage, chunk, layer, …], padded by copies of the last."""
    missing = self.virtual * self.per_stage - self.layers

    def one(path, leaf):
      rest = spec(letters_of(path, leaf.ndim)[1:], self.table, leaf.shape[1:])
      if missing:
        leaf = jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")
      leaf = leaf.reshape(self.chunks, self.stages, self.per_stage, *leaf.shape[1:]).swapaxes(0, 1)
      return jax.lax.with_sharding_constraint(leaf, PartitionSpec("stage", None, None, *rest))

    return tree.map_with_path(one, blocks)
