"""What a device holds at the worst moment of a training step, by kind, without a compiler.

Weights, optimizer state and gradients are exact: their declarations, cut by the same rules. What
layers keep for the backward pass follows from `model.remat`; what is alive inside one of them, and
in the head, from which arrays its products read and write. Left out are tables of positions, what
the compiler copies to change a layout, and its own code.
"""

import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh

from llmjax.core import tree
from llmjax.core.chips import Chip
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.parallel.mesh import AXES
from llmjax.parallel.rules import REPLICATED, WEIGHTS, optimizer_shardings, weight_shardings
from llmjax.parallel.schedules import make_schedule, tables
from llmjax.planning.arrays import Arrays
from llmjax.planning.traffic import DTYPE_BYTES
from llmjax.training.config import Config
from llmjax.training.optim import OptimConfig, make_optimizer
from llmjax.training.parameters import split

_shapes = functools.cache(abstract)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    weights: fp32 masters.
    optimizer: its state.
    gradients: fp32, of one micro-batch, which its layers' backward pass makes: whole where weights
      are, whatever is cut of them afterwards.
    sums: of those before it; of a pipeline all are added up in place.
    activations: what all layers keep for the backward pass, of one micro-batch.
    waiting: inputs of a pipeline's chunks and what lies between its stages.
    layer: inside one layer's backward pass: its arrays, gathered weights and their gradients.
    head: in the output head: its gathered weights and their gradient, logits of one chunk, the
      stream.
    host: what `remat=offload` keeps in the host's memory; not of the device.
  """

  weights: float
  optimizer: float
  gradients: float
  sums: float
  activations: float
  waiting: float
  layer: float
  head: float
  host: float = 0.0

  @property
  def peak(self) -> float:
    """All that is alive at the worst moment: in the head, or going back through the last layer."""
    kept = self.sums + self.activations + self.waiting
    return self.weights + self.optimizer + kept + max(self.head, self.gradients + self.layer)


def memory(config: Config, sizes: dict[str, int], chip: Chip | None = None) -> Memory:
  """Counts what a training step holds on each device.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    sizes: of every mesh axis.
    chip: what it runs on; None: a CPU, whose kernels keep attention's weights of short rows.
  Returns:
    Bytes by kind; `.peak` is what must fit.
  """
  model, parts, stages = config.model, config.train.grad_accum_steps, sizes["stage"]
  cut = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  held = _alike(model)
  weights, sums = (
    held_bytes(held, cut, whole)
    for whole in (config.train.zero_stage < 3, config.train.zero_stage == 1)
  )
  arrays = Arrays(config, sizes, chip)
  dense = model.moe.first_k_dense if model.moe.experts else 0
  chunks = config.pipeline.chunks if stages > 1 else 1
  layers = math.ceil((model.layers - dense) / (stages * chunks))
  kept, host = arrays.kept(moe=bool(model.moe.experts))
  first, first_host = arrays.kept(moe=False)
  waiting = 0
  if stages > 1:
    waiting = arrays.stream * _slots(config.pipeline.schedule, stages, parts, chunks)
  return Memory(
    weights=weights,
    optimizer=state_bytes(held, config.optim, cut),
    gradients=weights * (stages == 1),
    sums=sums * (parts > 1 or stages > 1),
    activations=layers * kept + dense * first,
    waiting=waiting,
    layer=arrays.layer(bool(model.moe.experts)) + _passing(held, cut, config.train.zero_stage),
    head=arrays.head(),
    host=layers * host + dense * first_host,
  )


def _alike(model: ModelConfig) -> ModelConfig:
  """The same for models that differ in nothing but how they are run, so that caches know them."""
  plain = ModelConfig()
  attention = dataclasses.replace(model.attention, block=plain.attention.block)
  return dataclasses.replace(model, remat=plain.remat, attention=attention)


@functools.cache
def held_bytes(model: ModelConfig, mesh: AbstractMesh, whole: bool = False) -> int:
  """Counts the bytes of a model's fp32 weights on a device, or of anything shaped like them.

  Args:
    model: the architecture.
    mesh: sizes of the axes.
    whole: over `fsdp`.
  """
  shapes = _shapes(model)
  return _bytes(shapes, weight_shardings(mesh, shapes, REPLICATED if whole else WEIGHTS))


@functools.cache
def _passing(model: ModelConfig, mesh: AbstractMesh, zero: int) -> float:
  """Counts the bytes of weights on their way: all layers' cast, one's gathered, and its gradient.

  Of the gradient two thirds: matrices that were scattered first are gone.
  """
  low, shapes = DTYPE_BYTES[model.dtype], tree.flatten(_shapes(model))
  blocks = {path: leaf for path, leaf in shapes.items() if "/blocks/" in path}
  own, whole = (
    sum(
      math.prod(where.shard_shape(blocks[path].shape))
      for path, where in weight_shardings(mesh, blocks, table).items()
    ) for table in (WEIGHTS, REPLICATED)
  )
  one = whole * mesh.shape["stage"] / next(iter(blocks.values())).shape[0] * (own < whole)
  cast = low * (own if zero == 3 else whole) * (low < 4)
  return cast + one * (low * (zero == 3) + 8 / 3 * (zero > 1))


@functools.cache
def state_bytes(model: ModelConfig, optim: OptimConfig, mesh: AbstractMesh) -> int:
  """Counts the bytes of the optimizer's state on a device."""
  shapes = _shapes(model)
  state = _moments(model, optim)
  return _bytes(state, optimizer_shardings(mesh, state, shapes))


@functools.cache
def _moments(model: ModelConfig, optim: OptimConfig):
  shapes = _shapes(model)
  trainable, _ = split(shapes, optim.groups)
  return jax.eval_shape(make_optimizer(optim, 1, shapes).init, trainable)


def _bytes(shapes, shardings) -> int:
  sizes = jax.tree.map(
    lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    shapes, shardings,
  )
  return sum(jax.tree.leaves(sizes))


@functools.cache
def _slots(kind: str, stages: int, parts: int, chunks: int) -> int:
  """Streams that lie in a stage's buffers."""
  plan = tables(make_schedule(kind, stages, parts, chunks))
  return sum(max(1, *buffer.slots) for buffer in plan.buffers[:3])
