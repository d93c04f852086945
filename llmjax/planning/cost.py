"""What a training step costs on a mesh: counted in traces of the model's layers and in shardings.

A model is traced once for each way to recompute it and to shard its positions and experts, on
abstract devices. All other mesh axes divide what was counted, so a search traces no candidate.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llmjax.core.chips import Chip
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import (
  abstract_devices,
  count_program,
  filled_share,
  forward_flops_per_token,
  seen_share,
)
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.platform_kernels import splash_tile
from llmjax.parallel.mesh import MeshConfig
from llmjax.parallel.schedules import make_schedule, tables
from llmjax.training.config import Config
from llmjax.training.optim import OptimConfig
from llmjax.training.parameters import abstract_state, combine, split

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
_ROWS = 101  # of a traced batch: a prime that divides no weight, by which activations are told
# Fitted to peaks that the TPU's compiler reported for thirty programs (docs/plan.md, "Held against
# the compiler"): which arrays of a layer are alive at once is its choice.
_LIVE = 1.0  # share of a layer's arrays alive in its backward pass where they are recomputed,
_LIVE_KEPT = 0.5  # and of gradients beside them where all are kept
_GRADIENT = 8 / 3  # bytes of a gathered layer's gradient a weight: those scattered first are gone
_KINDS = {
  "all_gather": "all-gather", "psum": "all-reduce", "psum_invariant": "all-reduce",
  "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
  "ragged_all_to_all": "all-to-all", "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Traced:
  """What a trace of all layers, forward and backward, counted for one token of a device.

  Attributes:
    flops: of products and of kernels other than attention's, recomputed ones included.
    attention_flops: of attention's kernels, were every pair of positions computed.
    kept: bytes kept for the backward pass, of all layers.
    host: bytes kept in the host's memory.
    live: bytes in the compute dtype that one layer's backward pass reads.
    sent: bytes passed on, by (kind of collective, mesh axis).
  """

  flops: float
  attention_flops: float
  kept: float
  host: float
  live: float
  sent: dict


@functools.cache
def trace_layers(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int
) -> Traced:
  """Traces the layers of a model on abstract devices that shard positions and experts.

  Args:
    model: the architecture; `remat` and how positions are sharded count.
    groups: `optim.groups`, which say what is trained.
    platform: whose kernels run: tpu, or cpu. A GPU's are not counted; a TPU's stand for them.
    context: devices that positions are sharded over.
    expert: devices that experts are sharded over.
  """
  cycle = len(model.attention.pattern)
  model = dataclasses.replace(model, layers=max(cycle, model.layers // cycle * cycle))
  traced, kept, tokens = _trace_backward(model, groups, platform, context, expert)
  count = functools.partial(
    count_program, traced, filled=filled_share(model, expert) if model.moe.experts else 1.0
  )
  counted, every_pair = (count(seen=lambda length, block, share=n: share) for n in (0.0, 1.0))
  sums = Counter()
  for aval in kept:
    sums[aval.memory_space.name] += _kept_bytes(aval, model)
  sent = {
    (_KINDS[key[0]], key[1]): size * context * expert / tokens
    for key, size in counted.items() if key != "flops"
  }
  return Traced(
    counted["flops"] / tokens, (every_pair["flops"] - counted["flops"]) / tokens,
    sums["Device"] / tokens, sums["Host"] / tokens,
    _live_bytes(dataclasses.replace(model, remat="none"), platform, context, expert), sent,
  )


@functools.cache
def _live_bytes(model: ModelConfig, platform: str, context: int, expert: int) -> float:
  """Bytes a token that one layer would keep in the compute dtype if nothing were recomputed."""
  layers, moe = len(model.attention.pattern), dataclasses.replace(model.moe, first_k_dense=0)
  model = dataclasses.replace(model, layers=layers, moe=moe)
  groups = OptimConfig().groups
  _, kept, tokens = _trace_backward(model, groups, platform, context, expert, pull_back=False)
  low = jnp.dtype(model.dtype)
  return sum(_kept_bytes(aval, model) for aval in kept if aval.dtype == low) / tokens / layers


def _trace_backward(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int,
  pull_back: bool = True,
) -> tuple:
  """Traces layers: (jaxpr, abstract values kept for the backward pass, tokens of the batch)."""
  attention = dataclasses.replace(model.attention, kernel="auto")
  model = dataclasses.replace(model, scan=True, dropout=0.0, attention=attention)
  ids = jax.ShapeDtypeStruct((_ROWS * expert, model.max_seq_len), jnp.int32)
  source = ids if model.kind == "encoder_decoder" else None
  batch = Batch(ids, segments_bt=ids, positions_bt=ids, source_bs=source)

  weights = abstract(model)

  def backward(trainable, frozen, batch):
    hidden = lambda trainable: combine(weights, trainable, frozen).hidden(batch)[0]  # noqa: E731
    x_btd, pull = jax.vjp(hidden, trainable)
    return pull, pull(x_btd) if pull_back else None

  with jax.sharding.use_abstract_mesh(abstract_devices(platform, context=context, expert=expert)):
    traced, shapes = jax.make_jaxpr(backward, return_shape=True)(*split(weights, groups), batch)
  kept = traced.jaxpr.outvars[: len(jax.tree.leaves(shapes[0]))]
  return traced.jaxpr, [var.aval for var in kept], ids.size


def _kept_bytes(aval, model: ModelConfig) -> int:
  """Bytes of a stack of layers' activations; 0 of weights and of what layers share.

  Where products are saved, a TPU keeps them in the compute dtype, not in that of their sums.
  """
  if aval.size % _ROWS or aval.ndim < 2 or aval.shape[0] % _ROWS == 0:
    return 0
  size = aval.dtype.itemsize
  return aval.size * (min(size, DTYPE_BYTES[model.dtype]) if model.remat == "dots" else size)


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
  tokens, traced = config.data.batch_size * length, _traced(config, sizes, platform)
  forward = forward_flops_per_token(model, length)
  head = 2 * model.width * model.vocab_size
  run = traced.flops + 3 * head
  if traced.attention_flops:
    tile = splash_tile(model.attention.block, length)
    run += traced.attention_flops * seen_share(model, length, tile)
  if sizes["stage"] > 1:  # each stage computes its chunk again for the gradient
    run += forward - head
  return 3 * forward * tokens, (run - 3 * forward) * tokens


def _traced(config: Config, sizes: dict[str, int], platform: str) -> Traced:
  """The trace that stands for a config on a mesh."""
  way = config.model.attention.context_parallel if sizes["context"] > 1 else ""
  if sizes["stage"] > 1 and way == "ring":  # inside of a pipeline keys are gathered
    way = "gather"
  kept = sizes["stage"] > 1 and config.pipeline.schedule == "zb_h1"  # it recomputes nothing further
  model = _alike(config.model, "none" if kept else config.model.remat, way)
  expert = sizes["expert"] if model.moe.experts else 1
  return _traced_at(model, config.optim.groups, platform, sizes["context"], expert)


@functools.cache
def _traced_at(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int
) -> Traced:
  """Puts a trace together from those of single saved names and of two devices of `context`.

  Names save what each of them saves alone. A token's arrays are the same on more devices; what is
  sent for it grows with every other device that there is.
  """
  names = model.remat.split("+")
  if len(names) > 1:
    full, *each = (
      _traced_at(dataclasses.replace(model, remat=name), groups, platform, context, expert)
      for name in ("full", *names)
    )
    return dataclasses.replace(full, **{
      key: getattr(full, key) + sum(getattr(one, key) - getattr(full, key) for one in each)
      for key in ("flops", "attention_flops", "kept")
    })
  two = trace_layers(model, groups, platform, min(2, context), expert)
  if context <= 2:
    return two
  if model.attention.context_parallel == "ring":
    four = trace_layers(model, groups, platform, 4, expert).sent
    sent = {key: size + (four[key] - size) * (context - 2) / 2 for key, size in two.sent.items()}
  else:
    sent = {
      key: size * (context - 1 if key[1] == "context" else 1) for key, size in two.sent.items()
    }
  return dataclasses.replace(two, sent=sent)


@functools.cache
def _alike(model: ModelConfig, remat: str = "", context_parallel: str = "") -> ModelConfig:
  """The same for models that differ in settings which change neither weights nor traces."""
  plain = AttentionConfig()
  attention = dataclasses.replace(
    model.attention, block=plain.block,
    context_parallel=context_parallel or plain.context_parallel,
  )
  return dataclasses.replace(model, attention=attention, remat=remat or ModelConfig().remat)


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
  traced = _traced(config, sizes, platform)
  trainable, frozen, optimizer = _state_leaves(config)
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  chunks = config.pipeline.chunks if stages > 1 else 1
  share = math.ceil(stacked_layers(model) / (stages * chunks)) / stacked_layers(model)
  waiting = 0.0
  if stages > 1:
    waiting = _waiting(config.pipeline.schedule, stages, micro_batches, chunks)
  trained = sharded_bytes(trainable, sizes)
  summed = _state_leaves(config, 3)[0] if config.train.zero_stage > 1 else trainable
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


def layer_bytes(config: Config, sizes: dict[str, int], platform: str = "tpu") -> float:
  """Bytes of the arrays that one layer makes of a micro-batch and its backward pass reads."""
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  return tokens * _traced(config, sizes, platform).live


def stacked_layers(model: ModelConfig) -> int:
  """Counts the layers that a pipeline deals out: without the first dense ones before experts."""
  return model.layers - (model.moe.first_k_dense if model.moe.experts else 0)


def micro_batch_tokens(config: Config, sizes: dict[str, int]) -> float:
  """Counts a device's tokens of one micro-batch."""
  devices = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
  tokens = config.data.batch_size * config.model.max_seq_len
  return tokens / devices / config.train.grad_accum_steps


def _state_leaves(config: Config, zero_stage: int = 0) -> tuple[Counter, Counter, Counter]:
  """Trainable and frozen parameters and optimizer state, in counters.

  They count bytes by (mesh axes that shard them, bytes of a number).
  """
  model, zero_stage = _alike(config.model), zero_stage or config.train.zero_stage
  key = model, config.optim, zero_stage
  if key not in _LEAVES:
    train = dataclasses.replace(Config().train, zero_stage=zero_stage, steps=config.train.steps)
    plain = dataclasses.replace(config, model=model, train=train, mesh=MeshConfig())
    _LEAVES[key] = _leaves(plain)
  return _LEAVES[key]


_LEAVES = {}


def _leaves(config: Config) -> tuple[Counter, Counter, Counter]:
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
  """Bytes of attention over sharded positions that no trace of its results shows, in fp32.

  Of a ring gradients of queries, keys and values, summed and just made; against gathered keys a
  strip of scores and weights, with their gradients.
  """
  model, context = config.model, sizes["context"]
  tokens = micro_batch_tokens(config, sizes) / sizes["tensor"]
  n, k, h = (model.dims[letter] for letter in "nkh")
  if context == 1 or model.attention.context_parallel == "all_to_all":
    return 0.0
  if model.attention.context_parallel == "ring":
    return 2 * 4 * tokens * h * (n + 2 * k)
  length = model.max_seq_len / context
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


@dataclasses.dataclass(frozen=True)
class CollectiveBytes:
  """Bytes that a device passes on in one step.

  Attributes:
    kind: of collective.
    axis: of the mesh.
    bytes: of all its executions.
  """

  kind: str
  axis: str
  bytes: float


def collective_bytes(config: Config, sizes: dict[str, int]) -> list[CollectiveBytes]:
  """Lists what a step sends: one entry for each kind of collective and mesh axis.

  Of a gathered array a device passes on the other devices' shares. What attention and experts send
  is read from their trace; the rest follows from the shardings of weights and batch.
  """
  total = Counter()
  for kind, axis, size in (
    *_weight_bytes(config, sizes), *_gradient_bytes(config, sizes), *_stream_bytes(config, sizes),
  ):
    if sizes[axis] > 1:
      total[kind, axis] += size
  return [CollectiveBytes(*key, size) for key, size in total.items()]


def _weight_bytes(config: Config, sizes) -> Iterator[tuple]:
  """Weights gathered over `fsdp`, for each micro-batch of ZeRO 3, else once after the update.

  Layers are gathered in the compute dtype on the way forward and back (a pipeline's stage, which
  goes forward twice, three times), the head once. Of the token table rows are exchanged.
  """
  model, train = config.model, config.train
  (trainable, frozen, _), others = _state_leaves(config, 3), 1 - 1 / sizes["fsdp"]
  if train.zero_stage < 3:
    yield "all-gather", "fsdp", sharded_bytes(trainable, sizes, "fsdp") * others
    return
  low, times = DTYPE_BYTES[model.dtype], 2 if sizes["stage"] == 1 else 3
  layers = Counter({
    (axes, number): size * min(1, low / number)
    for (axes, number), size in (trainable + frozen).items() if axes >= {"stage", "fsdp"}
  })
  gathered = times * sharded_bytes(layers, sizes, "fsdp")
  gathered += low * model.vocab_size * model.width / sizes["tensor"]
  yield "all-gather", "fsdp", train.grad_accum_steps * gathered * others
  stream = micro_batch_tokens(config, sizes) * model.width * low / sizes["tensor"]
  yield "all-to-all", "fsdp", 2 * train.grad_accum_steps * stream * others


def _gradient_bytes(config: Config, sizes) -> Iterator[tuple]:
  """Gradients summed over every axis that does not shard their weight, for each micro-batch."""
  train, times = config.train, config.train.grad_accum_steps
  tables = 1 if config.model.tie_embeddings else 2
  for (axes, number), size in _state_leaves(config, 3)[0].items():
    here = size / math.prod(sizes[axis] for axis in axes)
    if "fsdp" in axes:
      full, others = here * sizes["fsdp"], 1 - 1 / sizes["fsdp"]
      if train.zero_stage == 3:
        if "stage" not in axes:
          full /= tables  # the token table's gradient comes back in exchanged rows
        sums = DTYPE_BYTES[train.grad_reduce_dtype] / number
        yield "reduce-scatter", "fsdp", times * sums * full * others
      elif train.zero_stage == 2:
        yield "reduce-scatter", "fsdp", times * full * others
      else:
        yield "all-reduce", "fsdp", 2 * times * full * others
        here = full
    for axis in {"data", "context", "expert", "stage"} - axes:
      again = 1 if axis == "stage" else times
      yield "all-reduce", axis, 2 * again * here * (1 - 1 / sizes[axis])


def _stream_bytes(config: Config, sizes) -> Iterator[tuple]:
  """The residual stream between tensor's halves and pipeline's stages; what layers' traces sent.

  Source: of `tensor`: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.
  """
  model, times = config.model, config.train.grad_accum_steps
  tokens = times * micro_batch_tokens(config, sizes)
  stream, others = tokens * model.width * DTYPE_BYTES[model.dtype], 1 - 1 / sizes["tensor"]
  layers = model.layers / sizes["stage"]
  again = model.remat != "none" or sizes["stage"] > 1  # gathers both halves' input, sums the first
  yield "all-gather", "tensor", ((4 + 2 * again) * layers + 2) * stream * others
  yield "reduce-scatter", "tensor", ((4 + again) * layers + 2) * stream * others
  for (kind, axis), size in _traced(config, sizes, "tpu").sent.items():
    yield kind, axis, size * tokens / sizes["stage"] / (sizes["tensor"] if axis == "context" else 1)
  if sizes["context"] > 1 and model.attention.context_parallel == "all_to_all":
    query = layers * stream / sizes["tensor"] * model.dims["n"] * model.dims["h"] / model.width
    moved = 2 * query * (1 + model.dims["k"] / model.dims["n"]) * (1 - 1 / sizes["context"])
    yield "all-to-all", "context", (2 + again) * moved
  if sizes["stage"] > 1:
    how = config.pipeline
    ticks = len(make_schedule(how.schedule, sizes["stage"], times, how.chunks).table)
    yield "collective-permute", "stage", 2 * ticks * stream / times / sizes["tensor"]
