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
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.nn.dropout import NAMES
from llmjax.nn.mlp import GATED
from llmjax.parallel.mesh import AXES
from llmjax.parallel.rules import REPLICATED, WEIGHTS, optimizer_shardings, weight_shardings
from llmjax.parallel.schedules import make_schedule, tables
from llmjax.plan.chips import Chip
from llmjax.plan.traffic import DTYPE_BYTES
from llmjax.train.config import Config
from llmjax.train.optim import OptimConfig, make_optimizer

_KEPT = {
  "full": ("stream",),
  "dots": (
    *("stream", "query", "key", "value", "projected", "gate", "up"),
    *("expanded", "latents"),
  ),
  "save_projections": ("stream", *NAMES),
}
_HEADS = ("query", "key", "value", "expanded", "attention")
_MORE = ("turned", "projected", "dispatched", "latents")
_HIDDEN = tuple(f"{kind}{name}" for kind in ("", "expert_") for name in ("gate", "up", "hidden"))
_LANES = 128  # a TPU's arrays are padded to so many numbers in their last dimension


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
  model, parts, stages = config.model, config.train.accumulation, sizes["stage"]
  cut = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  held = _alike(model)
  weights, sums = (
    held_bytes(held, cut, whole) for whole in (config.train.zero < 3, config.train.zero == 1)
  )
  arrays = _Arrays(config, sizes, chip)
  dense = model.moe.dense_first if model.moe.experts else 0
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
    layer=arrays.layer(bool(model.moe.experts)) + _passing(held, cut, config.train.zero),
    head=arrays.head(),
    host=layers * host + dense * first_host,
  )


def dispatched_bytes(config: Config, sizes: dict[str, int]) -> tuple[float, float, float]:
  """Counts the rows of one layer's experts on a device, of one micro-batch.

  Returns:
    Bytes of (rows where tokens are, room for them where experts are, one array of the room's rows
    as wide as an expert).
  """
  arrays, moe = _Arrays(config, sizes, None), config.model.moe
  there, room = arrays._rows()
  wide = (moe.width or config.model.mlp_width) / config.model.width / sizes["tensor"]
  return there, room, room * wide


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
  return jax.eval_shape(make_optimizer(optim, 1, shapes).init, shapes)


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


class _Arrays:
  """Arrays of one micro-batch on one device, in bytes.

  `stream` is the residual stream as it lies between layers, `whole` as products read it: over
  `tensor` the first has its positions cut.
  """

  def __init__(self, config: Config, sizes: dict[str, int], chip: Chip | None):
    model, tensor = config.model, sizes["tensor"]
    self.config, self.sizes = config, sizes
    ways = sizes["data"] * sizes["fsdp"] * sizes["expert"] * config.train.accumulation
    self.rows = config.data.batch_size / ways
    self.length = model.context / sizes["context"]
    self.number = DTYPE_BYTES[model.dtype]
    self.lanes = 1 if chip is None or not chip.sizes else _LANES
    self.whole = self.of(model.width)
    self.stream = self.whole / tensor
    self.short = chip is None and model.context <= 1024

  def of(self, width: float, tensor: int = 1, number: float = 0) -> float:
    """An array of so many numbers a token."""
    return self.rows * self.length * width * (number or self.number) / tensor

  def layer_arrays(self, moe: bool) -> dict[str, float]:
    """What a layer's forward pass makes and its backward pass could read, by name."""
    model = self.config.model
    gates = ("gate", "up", "hidden") if model.activation in GATED else ("up", "hidden")
    norms = {"parallel_shared": 1}.get(model.block, 4 if model.norm.place == "sandwich" else 2)
    made = {"stream": self.stream, "normed": min(norms, 2) * self.whole}
    if model.block == "sequential":
      made["projected"] = self.whole  # each device's part of a sum over `tensor`
    made["norms"] = norms * 3 * self.stream * 4 / self.number  # in fp32
    made |= self._attention()
    made["norms"] += 3 * made.get("latents", 0) * 4 / self.number
    if moe:
      there, sent = self._rows()
      made["dispatched"] = sent + there  # rows in, and what became of them
      width = (model.moe.width or model.mlp_width) / model.width / self.sizes["tensor"]
      made |= dict.fromkeys((f"expert_{name}" for name in gates), sent * width)
    wide = model.moe.shared * (model.moe.width or model.mlp_width) if moe else model.mlp_width
    made |= dict.fromkeys(gates, self.of(wide, self.sizes["tensor"]))
    return made if "gate" in made else made | {"slope": 2 * made["up"]}

  def _attention(self) -> dict[str, float]:
    model, tensor = self.config.model, self.sizes["tensor"]
    latent = model.attention.latent
    n, k, h = (model.dims[letter] for letter in "nkh")
    pad = lambda width: math.ceil(width / self.lanes) * self.lanes  # noqa: E731
    query, key = (self.of(heads * pad(h), tensor) for heads in (n, k))
    made = {"query": query, "key": key, "value": key, "attention": query}
    if latent.kv_rank:  # `key` is what a cache would hold; every head's are made of it
      made["key"], made["value"] = self.of(latent.kv_rank + latent.rope_dim), 0.0
      made["attention"] = self.of(n * latent.value_dim, tensor)
      made["expanded"] = self.of(n * latent.nope_dim, tensor) + made["attention"]
      made["latents"], made["joined"] = self.of(latent.query_rank), key
    if self.lanes > 1:
      made["attention"] = query  # a kernel's values are as wide as its keys
      made["turned"] = query  # attention's result once by heads for its kernel, once by positions
    if self.short:
      made["scores"] = self.of(n * self.length, tensor, 4 + self.number)
    return made

  def _rows(self) -> tuple[float, float]:
    """Rows for experts where tokens are, and room for them where experts are."""
    moe, t, ways = self.config.model.moe, self.config.model.context, self.sizes["expert"]
    most = min(1, moe.slots(t) / t or 1)  # of all tokens that one expert takes
    there = self.whole * min(moe.top_k, moe.experts * most)
    if ways == 1:
      return there, there
    return there, ways * self.whole * min(moe.top_k, moe.experts // ways * most)

  def kept(self, moe: bool) -> tuple[float, float]:
    """What one layer keeps for the backward pass: (on the device, on the host)."""
    made, remat = self.layer_arrays(moe), self.config.model.remat
    total = lambda names: sum(made.get(name, 0) for name in names)  # noqa: E731
    if remat == "offload":
      return made["stream"], total(NAMES)
    if remat == "none":
      return total(made.keys() - {"stream", "projected"}), 0.0
    return total(_KEPT.get(remat, ("stream", *remat.split("+")))), 0.0

  def layer(self, moe: bool) -> float:
    """What is alive inside one layer's backward pass beside what is kept."""
    made = self.layer_arrays(moe)
    total = lambda names: sum(made.get(name, 0) for name in names)  # noqa: E731
    apart = self._context(made)
    if self.config.model.remat == "none":
      return apart + max(total(_HEADS), total(_HIDDEN)) + 3 * self.stream
    return apart + total((*_HEADS, *_HIDDEN, *_MORE)) + self.stream

  def _context(self, made: dict[str, float]) -> float:
    """What attention takes more where positions are cut: gradients in fp32, and what it gathers.

    Of a ring those of queries, keys and values, summed and just made. Of gathered keys their
    gradients, and a strip's scores and weights with theirs.
    """
    model, ways = self.config.model, self.sizes["context"]
    pair = (made["key"] + made["value"]) / self.number  # numbers
    if ways == 1 or model.attention.context == "all_to_all":
      return 0.0
    if model.attention.context == "ring":
      return 2 * 4 * (pair + made["query"] / self.number)
    heads = self.rows * model.heads / self.sizes["tensor"]
    strip = heads * min(model.attention.block, self.length) * model.context
    return ways * pair * (self.number + 4) + 4 * 4 * strip

  def head(self) -> float:
    """What is alive while logits are: the gathered head, a chunk of them twice, the stream."""
    model, tensor = self.config.model, self.sizes["tensor"]
    chunk = min(self.config.loss.chunk or self.length, self.length)
    logits = self.rows * chunk * model.vocab_size * 4 / tensor
    table = model.width * model.vocab_size / tensor
    return table * (self.number + 4) + 2 * logits + 3 * self.whole
