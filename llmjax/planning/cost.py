"""FLOPs of a training step, and its memory on each device, from traces and shardings."""

import dataclasses
import functools
import math
from collections import Counter

import jax

from llmjax.core.chips import Chip
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import abstract_devices, forward_flops_per_token, seen_share
from llmjax.nn.attention.platform_kernels import splash_tile
from llmjax.parallel.schedules import make_schedule, tables
from llmjax.planning.trace import DTYPE_BYTES, alike, trace_of
from llmjax.training.config import Config
from llmjax.training.optim import OptimConfig
from llmjax.training.parameters import abstract_state

# Fitted to peaks that the TPU's compiler reported for thirty programs (docs/plan.md, "Held against
# the compiler"): which arrays of a layer are alive at once is its choice.
_LIVE = 1.0  # share of a layer's arrays alive in its backward pass where they are recomputed,
_LIVE_KEPT = 0.5  # and of gradients beside them where all are kept
_GRADIENT = 8 / 3  # bytes of a gathered layer's gradient a weight: those scattered first are gone


def step_flops(config: Config, sizes: dict[str, int], platform: str = "tpu") -> tuple[float, float]:
  """Counts a step's FLOPs on all devices.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    sizes: of every mesh axis.
    platform: whose kernels run: tpu or cpu.
  Returns:
    (those of the model: forward, and twice as many backward; those beyond: what remat and a
    pipeline's stages compute again, what attention's kernels compute again or need not compute).
  """
  model, length = config.model, config.model.max_seq_len
  tokens, traced = config.data.batch_size * length, trace_of(config, sizes, platform)
  forward = forward_flops_per_token(model, length)
  head = 2 * model.width * model.vocab_size
  run = traced.flops + 3 * head
  if traced.attention_flops:
    tile = splash_tile(model.attention.block, length)
    run += traced.attention_flops * seen_share(model, length, tile)
  if sizes["stage"] > 1:  # each stage computes its chunk again for the gradient
    run += forward - head
  return 3 * forward * tokens, (run - 3 * forward) * tokens


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    weights: as they are stored.
    optimizer: the optimizer's state.
    gradients: of one micro-batch, which the backward pass of its layers makes before they are
      scattered.
    sums: gradients of the micro-batches before it; a pipeline adds all of them up in place.
    activations: what all layers keep for the backward pass, of one micro-batch.
    waiting: inputs of a pipeline's chunks, and activations and gradients between its stages.
    layer: inside one layer's backward pass: its arrays, gathered weights and their gradients.
    head: in the output head: its gathered weights and their gradient, logits of one chunk, the
      residual stream.
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
  """Estimates what a training step holds on each device.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    sizes: of every mesh axis.
    chip: what it runs on; None: a CPU.
  Returns:
    Bytes by kind; `.peak` is what must fit.
  """
  model, micro_batches, stages = config.model, config.train.grad_accum_steps, sizes["stage"]
  platform = "tpu" if chip else "cpu"
  traced = trace_of(config, sizes, platform)
  trainable, frozen, optimizer = state_leaves(config)
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  chunks = config.pipeline.chunks if stages > 1 else 1
  share = math.ceil(stacked_layers(model) / (stages * chunks)) / stacked_layers(model)
  waiting = 0.0
  if stages > 1:
    waiting = _waiting(config.pipeline.schedule, stages, micro_batches, chunks)
  trained = sharded_bytes(trainable, sizes)
  summed = state_leaves(config, 3)[0] if config.train.zero_stage > 1 else trainable
  live = layer_bytes(config, sizes, platform) * (_LIVE_KEPT if model.remat == "none" else _LIVE)
  stream = tokens * model.width * DTYPE_BYTES[model.dtype]
  live += 2 * (sizes["tensor"] - 1) * stream  # what both halves of a layer gather
  return Memory(
    weights=trained + sharded_bytes(frozen, sizes),
    optimizer=sharded_bytes(optimizer, sizes),
    gradients=trained * (stages == 1),
    sums=sharded_bytes(summed, sizes) * (micro_batches > 1 or stages > 1),
    activations=tokens * traced.kept * share,
    waiting=waiting * stream,
    layer=live + _context_bytes(config, sizes) + _gathered_bytes(config, trainable, frozen, sizes),
    head=_head_bytes(config, sizes),
    host=tokens * traced.host * share,
  )


def _gathered_bytes(config: Config, trainable: Counter, frozen: Counter, sizes) -> float:
  """Bytes of layers' weights in use: all cast to the compute dtype, one gathered, its gradient."""
  low, zero_stage = DTYPE_BYTES[config.model.dtype], config.train.zero_stage
  total = 0.0
  for (axes, number), size in (*trainable.items(), *frozen.items()):
    if "stage" not in axes:
      continue
    here = size / number / math.prod(sizes[axis] for axis in axes)
    layer = here * sizes["stage"] / stacked_layers(config.model)
    total += here * low * (low < number)
    if sizes["fsdp"] > 1 and zero_stage == 3:
      layer *= sizes["fsdp"] if "fsdp" in axes else 1
      total += layer * min(low, number)
    if sizes["fsdp"] > 1 and zero_stage > 1 and (axes, number) in trainable:
      total += layer * _GRADIENT
  return total


def _context_bytes(config: Config, sizes: dict[str, int]) -> float:
  """Bytes of attention over sharded positions that no trace of its results shows, in fp32."""
  model, context = config.model, sizes["context"]
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  n, k, h = (model.dims[letter] for letter in "nkh")
  if context == 1 or model.attention.context_parallel == "all_to_all":
    return 0.0
  if model.attention.context_parallel == "ring":  # gradients of q, k and v, and their sums
    return 2 * 4 * tokens * h * (n + 2 * k)
  length = model.max_seq_len / context  # a strip of scores and weights, with their gradients
  return 4 * 4 * tokens * n * model.max_seq_len * min(model.attention.block, length) / length


def _head_bytes(config: Config, sizes: dict[str, int]) -> float:
  """Bytes alive while logits are: the gathered head, its gradient, a chunk of them twice."""
  model, number = config.model, DTYPE_BYTES[config.model.dtype]
  tokens, length = micro_batch_tokens(config, sizes), model.max_seq_len / sizes["context"]
  chunk = min(config.loss.chunk or length, length) / length
  logits = tokens * chunk * model.vocab_size * 4 / sizes["tensor"]
  table = model.width * model.vocab_size / sizes["tensor"]
  return table * (number + 4) + 2 * logits + 3 * tokens * model.width * number


@functools.cache
def _waiting(kind: str, stages: int, micro_batches: int, chunks: int) -> int:
  """Counts the residual streams in a stage's buffers."""
  plan = tables(make_schedule(kind, stages, micro_batches, chunks))
  return sum(max(1, *buffer.slots) for buffer in plan.buffers[:3])


def layer_bytes(config: Config, sizes: dict[str, int], platform: str = "tpu") -> float:
  """Bytes of the arrays that one layer makes of a micro-batch and its backward pass reads."""
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  return tokens * trace_of(config, sizes, platform).live


def stacked_layers(model: ModelConfig) -> int:
  """Counts the layers that a pipeline deals out: without the first dense ones before experts."""
  return model.layers - (model.moe.first_k_dense if model.moe.experts else 0)


def micro_batch_tokens(config: Config, sizes: dict[str, int]) -> float:
  """Counts a device's tokens of one micro-batch."""
  devices = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
  tokens = config.data.batch_size * config.model.max_seq_len
  return tokens / devices / config.train.grad_accum_steps


def state_leaves(config: Config, zero_stage: int = 0) -> tuple[Counter, Counter, Counter]:
  """Counts bytes of trainable and frozen parameters and of optimizer state.

  Returns:
    For each a counter by (mesh axes that shard them, bytes of a number).
  """
  return _leaves(alike(config.model), config.optim, zero_stage or config.train.zero_stage)


@functools.cache
def _leaves(model: ModelConfig, optim: OptimConfig, zero_stage: int) -> tuple[Counter, ...]:
  train = dataclasses.replace(Config().train, zero_stage=zero_stage)
  config = dataclasses.replace(Config(), model=model, optim=optim, train=train)
  state = abstract_state(config, abstract_devices("tpu"))
  found = Counter(), Counter(), Counter()
  trees = state.trainable, state.frozen, state.optimizer
  for counter, tree in zip(found, trees, strict=True):
    for leaf in jax.tree.leaves(tree):
      axes = jax.tree.leaves(tuple(leaf.sharding.spec))
      counter[frozenset(axes), leaf.dtype.itemsize] += leaf.size * leaf.dtype.itemsize
  return found


def sharded_bytes(leaves: Counter, sizes: dict[str, int], but: str = "") -> float:
  """Bytes of leaves on a device; `but` names an axis over which they are gathered."""
  return sum(
    size / math.prod(sizes[axis] for axis in axes if axis != but)
    for (axes, _), size in leaves.items()
  )
