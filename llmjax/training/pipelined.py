"""Loss and gradient where layers are cut over `stage`: the model as chunks of a pipeline.

Embedding and head belong to the first and last virtual stage; what layers are given alike (masks,
the table of relative positions) is made on every one. Every stage holds all weights outside the
layers, and their gradients are added over stages, so that tied ones get both.
"""

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
from llmjax.core.choices import check_choice, check_least
from llmjax.core.dims import letters_of
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.depth import count, run_some
from llmjax.parallel.pipeline import leaves_read, run_pipeline
from llmjax.parallel.rules import REPLICATED, WEIGHTS, spec
from llmjax.parallel.schedules import KINDS, check_numbers, make_schedule
from llmjax.training.losses import LossConfig, head_loss, routing_loss


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How microbatches go through the stages; there are `train.grad_accum_steps` of them.

  Attributes:
    schedule: gpipe, 1f1b, interleaved, zb_h1.
    chunks: pieces of the stack that each stage holds; more than 1 is interleaved.
  """

  schedule: str = "1f1b"
  chunks: int = 1

  def __post_init__(self):
    check_choice("pipeline.schedule", self.schedule, KINDS)
    check_least("pipeline", self, chunks=1)


def check_stages(kind: str, stages: int, microbatches: int, config: PipelineConfig):
  """Raises a `UserError` where a kind of model, or a schedule of such numbers, has no pipeline."""
  if kind not in ("decoder", "encoder"):
    raise UserError(f"mesh.stage cuts decoders and encoders, not model.kind={kind}")
  check_numbers(config.schedule, stages, microbatches, config.chunks)


def pipelined_grad(
  model, parts: Batch, loss: LossConfig, key=None, config: PipelineConfig | None = None, zero=3,
  each=1.0, layout: Callable = lambda weights: weights,
):
  """Computes the sum of the objective's gradient over microbatches, and the cross-entropy sum.

  Args:
    model: a decoder or an encoder, on a mesh whose `stage` is more than 1.
    parts: [m, b, t] microbatches.
    loss: terms beside the cross-entropy.
    key: PRNG key of dropout; microbatch i draws from `fold_in(key, i)`.
    config: schedule and chunks.
    zero: whether weights are cut along `fsdp` in the stages as well.
    each: factor on routers' terms.
    layout: what marks the weights that `fsdp` cuts; see `shard_weights`.
  Returns:
    (gradient shaped as the model, cross-entropy sum, what routers did or None).
  Raises:
    UserError: a kind of model that has no pipeline, or numbers that its schedule cannot take.
  """
  config = config or PipelineConfig()
  mesh = jax.sharding.get_abstract_mesh()
  stages, microbatches = mesh.shape["stage"], len(jax.tree.leaves(parts)[0])
  check_stages(model.config.kind, stages, microbatches, config)
  schedule = make_schedule(config.schedule, stages, microbatches, config.chunks)
  blocks, outer = model.stack.blocks, _with_blocks(model, ())
  layers, before = count(blocks), model.stack.dense
  deal = StageAssignment(layers, stages, config.chunks, WEIGHTS if zero == 3 else REPLICATED)
  lone = key is not None and microbatches == 1
  remat = config.schedule != "zb_h1"
  chunk = _Chunk(model.config, loss, deal, before, lone, remat, layout)

  def stage(weights, outer, given):
    parts, *_ = given
    b, t = parts.tokens_bt.shape[1:]
    x = jax.ShapeDtypeStruct((b, t, model.config.width), jnp.dtype(model.config.dtype))
    mine = jax.tree.map(lambda leaf: leaf[0], weights)
    one = jax.tree.map(lambda leaf: leaf[0], mine)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    sums = jax.eval_shape(functools.partial(chunk, given), one, outer, x, number, number)[2]
    common = leaves_read(functools.partial(chunk.shared, given, microbatch=0), outer)
    made = run_pipeline(schedule, functools.partial(chunk, given), mine, outer, x, sums, common)
    outer_grads, sums = jax.lax.psum((made.outer, made.sums), "stage")
    return jax.tree.map(lambda leaf: leaf[None], made.weights), outer_grads, sums

  cut, whole = PartitionSpec("stage"), PartitionSpec()
  run = jax.shard_map(
    stage,
    in_specs=(cut, whole, whole),
    out_specs=(cut, whole, whole),
    axis_names={"stage"},
    check_vma=False,
  )
  dealt, undeal = jax.vjp(deal.out, blocks)
  block_grads, outer_grads, (nll, routing) = run(dealt, outer, (parts, key, each))
  routing = jax.tree.map(lambda leaf: leaf[:layers], routing)
  return _with_blocks(outer_grads, undeal(block_grads)[0]), nll, routing


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """What a virtual stage does to a microbatch: its layers, and at the ends embedding or loss."""

  config: ModelConfig
  loss: LossConfig
  deal: "StageAssignment"
  before: int  # dense layers, which run with the embedding
  lone: bool  # one microbatch draws as a step without microbatches does
  remat: bool
  layout: Callable

  def __call__(self, given, weights, outer, x_btd, virtual, microbatch):
    """Returns (x_btd, objective, (cross-entropy sum, what routers did))."""
    weights, outer = self.layout(weights), self.layout(outer)
    part, drop = self._microbatch(given, microbatch)
    shared, deal, each = self.shared(given, outer, microbatch), self.deal, given[2]

    def start(outer, x_btd):
      return outer.stack.run_first(outer.embed_tokens(part, drop), shared)[0]

    x_btd = jax.lax.cond(virtual == 0, start, lambda outer, x: x, outer, x_btd)
    x_btd, routing = run_some(
      weights, x_btd, virtual * deal.each, deal.layers, shared, self.config, deal.numbers,
      self.remat, self.before,
    )

    def end(outer, x_btd):
      made = outer.final_norm(x_btd)
      return head_loss(self.loss, outer.head, made, part.targets_bt, part.loss_mask_bt)

    nothing = lambda outer, x: (jnp.float32(0), jnp.float32(0))  # noqa: E731
    objective, nll = jax.lax.cond(virtual == deal.virtual - 1, end, nothing, outer, x_btd)
    if routing is not None:
      objective += each * routing_loss(self.loss, routing)
      routing = jax.tree.map(functools.partial(deal.place, virtual), routing)
    return x_btd, objective, (nll, routing)

  def shared(self, given, outer, microbatch):
    """Makes what the layers of every virtual stage are given alike."""
    return outer.shared(*self._microbatch(given, microbatch))

  def _microbatch(self, given, number):
    """A microbatch and its key of dropout."""
    parts, key, _ = given
    part = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, 0, False), parts)
    return part, None if key is None else key if self.lone else jax.random.fold_in(key, number)


class StageAssignment:
  """Which layers are whose: virtual stage v = chunk · stages + stage has layers v·each and on."""

  def __init__(self, layers: int, stages: int, chunks: int, table: dict):
    self.layers, self.stages, self.chunks, self.table = layers, stages, chunks, table
    self.virtual = stages * chunks
    self.each = math.ceil(layers / self.virtual)
    self.numbers = [[v * self.each + i for v in range(self.virtual)] for i in range(self.each)]

  def place(self, virtual, made):
    """Puts what a virtual stage's layers made [layer, …] among those of all, which are zeros."""
    room = jnp.zeros((self.virtual * self.each, *made.shape[1:]), made.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, made, virtual * self.each, 0)

  def out(self, blocks):
    """Deals stacked layers [l, …] out as [stage, chunk, layer, …]; missing ones are copies."""
    room = self.virtual * self.each

    def one(path, leaf):
      letters = letters_of(path, leaf.ndim)
      if room > self.layers:
        leaf = jnp.pad(leaf, ((0, room - self.layers), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")
      leaf = leaf.reshape(self.chunks, self.stages, self.each, *leaf.shape[1:]).swapaxes(0, 1)
      rest = spec(letters[1:], self.table)
      return jax.lax.with_sharding_constraint(leaf, PartitionSpec("stage", None, None, *rest))

    return tree.map_with_path(one, blocks)


def _with_blocks(model: nnx.Module, blocks) -> nnx.Module:
  """The model with other stacked blocks in its stack."""
  model, stack = copy.copy(model), copy.copy(model.stack)
  stack.blocks = nnx.data(blocks)
  setattr(model, model.config.kind, stack)
  return model
