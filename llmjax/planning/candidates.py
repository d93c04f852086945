"""What a search chooses from: meshes that divide a model, and the knobs that cost time or memory.

And `estimate`, the seconds that put them in order before anything is compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from llmjax.core.chips import Topology
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.formulas import forward_flops_per_token
from llmjax.nn.attention.platform_kernels import splash_tile
from llmjax.parallel.mesh import AXES
from llmjax.parallel.rules import WEIGHTS, ZERO, check_layout, weight_shardings
from llmjax.parallel.schedules import make_schedule
from llmjax.planning.cost import layer_bytes, micro_batch_tokens, stacked_layers
from llmjax.planning.formulas import roofline, sent_s, slow_axes
from llmjax.planning.traffic import CollectiveBytes, collective_bytes
from llmjax.training.config import Config
from llmjax.training.runnable import unread

_TENSOR = 16  # most devices that heads are sharded over
_MICRO_BATCHES = 64  # most of them
_POSITIONS = 1024  # least of a device
# gpipe has the bubble of 1f1b and keeps more; offload's link to the host is in no table.
_SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1))
_REMAT = (
  *("none", "dots", "save_projections", "full"),
  *("query+key+value", "attention+query+key+value", "attention+query+key+value+gate"),
)
_SAVED = ("attention", "query", "key+value", "gate", "up")  # one by one, of the best meshes
_BLOCKS = (64, 128, 256, 512)
_CHUNKS = (128, 256, 512, 1024, 2048)  # of positions that have logits at a time
_VMEM_MIB = (32, 48)  # of fast memory for a fusion: no formula knows what it gains
_SHARE = 0.92  # of the peak that large products reach, with the elementwise work between them;
_TOKENS = 500  # half of it where a device has so many tokens of a micro-batch
_TILE_STEP_S = 0.35e-6  # of a kernel's step over one tile, whatever it holds
_PASSES = 16  # times that arrays of experts' tokens go through memory
_HIDDEN = 0.9  # share of sending that work hides, but all wait
_AWAITED = ("tensor", "expert")  # along these axes
_SUMS = ("reduce-scatter", "all-reduce")  # and for sums of gradients


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run an experiment.

  Attributes:
    config: the experiment so changed.
    changes: by dotted key, what the search set.
    chips: where.
    sizes: of every mesh axis.
  """

  config: Config
  changes: dict
  chips: Topology
  sizes: dict


def change(config, changes: dict):
  """Sets values of a frozen config by dotted key; {"train.zero_stage": 1}."""
  values = {key: value for key, value in changes.items() if "." not in key}
  for section in {key.partition(".")[0] for key in changes if "." in key}:
    inner = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{section}.")}
    values[section] = _changed(getattr(config, section), tuple(inner.items()))
  return dataclasses.replace(config, **values)


@functools.lru_cache(maxsize=4096)
def _changed(section, changes: tuple):
  """Checks a section's values once, however many candidates share them."""
  return change(section, dict(changes))


def meshes(config: Config, chips: Topology) -> Iterator[dict[str, int]]:
  """Lists meshes of a topology that divide rows, positions, layers, experts and all weights.

  Left out as never sensible: `tensor` above 16 ways, fewer than 1,024 positions to a device,
  `expert` without experts (it is `data` then), stages that idle on more than an eighth of their
  layers. Only the axis that crosses slices is larger than a slice.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    chips: the devices; all are used.
  Yields:
    Sizes by axis, and under "across" the axis that crosses slices.
  """
  weights = abstract(config.model)
  for split in _splits(chips.devices, len(AXES)):
    sizes = dict(zip(AXES, split, strict=True))
    if _sensible(config, sizes) and _divides(weights, sizes):
      for across in ("data", "stage") if chips.slices > 1 else ("data",):
        if sizes[across] % chips.slices == 0:
          yield sizes | {"across": across}


def _splits(number: int, factors: int) -> Iterator[tuple]:
  """All ways to write a number as an ordered product."""
  if factors == 1:
    yield (number,)
    return
  for first in _divisors(number):
    yield from ((first, *rest) for rest in _splits(number // first, factors - 1))


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
  return tuple(n for n in range(1, number + 1) if number % n == 0)


def _sensible(config: Config, sizes: dict[str, int]) -> bool:
  model, stages, context = config.model, sizes["stage"], sizes["context"]
  return (
    sizes["tensor"] <= _TENSOR
    and (sizes["expert"] == 1 or model.moe.experts > 0)
    and model.max_seq_len % context == 0
    and (context == 1 or model.max_seq_len // context >= _POSITIONS)
    and (stages == 1 or model.kind in ("decoder", "encoder"))
    and math.ceil(stacked_layers(model) / stages) * stages <= 1.125 * stacked_layers(model)
    and config.data.batch_size % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0
  )


def _divides(weights, sizes: dict[str, int]) -> bool:
  """Whether the rules that lay weights out take a mesh."""
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  try:
    weight_shardings(mesh, weights)
    check_layout(mesh, weights, WEIGHTS)
  except UserError:
    return False
  return True


def candidates(config: Config, chips: Topology) -> Iterator[Candidate]:
  """Lists every mesh with every ZeRO stage, number of micro-batches, remat and schedule.

  Args:
    config: the experiment, `model.vocab_size` filled in; its global batch is kept.
    chips: the devices.
  """
  for sizes in meshes(config, chips):
    across = sizes.pop("across")
    mesh = {f"mesh.{axis}": size for axis, size in sizes.items()}
    mesh |= {"mesh.across": across, "mesh.slices": 0}
    mesh |= {key: value for axis, key, value in unread() if sizes[axis] == 1}
    for knobs in _knobs(config, sizes):
      changes = mesh | knobs
      yield Candidate(change(config, changes), changes, chips, sizes)


def _knobs(config: Config, sizes: dict[str, int]) -> Iterator[dict]:
  stages = sizes["stage"]
  sequences = config.data.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
  for times in _divisors(sequences):
    if (stages > 1 and times < stages) or times > max(_MICRO_BATCHES, 4 * stages):
      continue
    for zero in ZERO if sizes["fsdp"] > 1 else (3,):
      for remat in _REMAT:
        knobs = {"train.grad_accum_steps": times, "train.zero_stage": zero, "model.remat": remat}
        summed = zero == 3 and sizes["fsdp"] > 1
        knobs["train.grad_reduce_dtype"] = config.train.grad_reduce_dtype if summed else "float32"
        if stages == 1:
          yield knobs
          continue
        for schedule, chunks in _SCHEDULES:
          rounds = times % stages == 0 and stacked_layers(config.model) % (stages * chunks) == 0
          if chunks == 1 or rounds:
            yield knobs | {"pipeline.schedule": schedule, "pipeline.chunks": chunks}


def refined(candidate: Candidate) -> Iterator[Candidate]:
  """Lists a candidate with attention blocks that make other tiles, other chunks, other saved names.

  The search does it for the best of some meshes alone: of all it would be a hundred times as many.
  """
  config, local = candidate.config, candidate.config.model.max_seq_len // candidate.sizes["context"]
  tiles = {}
  for block in (config.model.attention.block, *_BLOCKS):
    tiles.setdefault(splash_tile(block, config.model.max_seq_len), block)
  chunks = {config.loss.chunk, *(size for size in _CHUNKS if size <= local)}
  saved = {config.model.remat}
  if not saved & {"none", "dots", "offload"}:
    sets = itertools.product(*((name, "") for name in _SAVED))
    special = {(): "full", _SAVED: "save_projections"}
    sets = (tuple(filter(None, names)) for names in sets)
    saved |= {special.get(names, "+".join(names)) for names in sets}
  for block, chunk, remat in itertools.product(tiles.values(), chunks, sorted(saved)):
    other = {"model.attention.block": block, "loss.chunk": chunk, "model.remat": remat}
    yield _changed_further(candidate, other)


def _changed_further(candidate: Candidate, other: dict) -> Candidate:
  config = change(candidate.config, other)
  return dataclasses.replace(candidate, config=config, changes=candidate.changes | other)


def with_vmem(candidate: Candidate) -> list[Candidate]:
  """Lists a candidate with other amounts of fast memory for a fusion; nothing for GPUs and a v4."""
  if not candidate.chips.chip.sizes or candidate.chips.chip.name == "v4":
    return []
  sizes = [size for size in _VMEM_MIB if size != candidate.config.train.vmem_mib]
  return [_changed_further(candidate, {"train.vmem_mib": size}) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step by formula, and the share of peak that the model's own products are."""

  step_s: float
  mfu: float


def estimate(candidate: Candidate) -> Estimate:
  """Estimates a step's seconds, to put candidates in order; never below the roofline.

  Assumed: products reach 0.92 of peak, less where a device's share of the feed-forward width is
  narrow or its tokens are few; a masked tile of attention is computed whole, and each tile costs
  0.35 µs more; what `roofline` has pass through memory comes on top, the head's gradient with each
  chunk of logits, and elementwise work on experts' tokens; stages wait for the fullest, and the
  last has the head. Work hides 0.9 of what is sent; of streams between `tensor`'s halves, tokens on
  their way to experts and sums of gradients nothing, as the compiler's programs have it
  (docs/LOG.md).
  """
  config, sizes, model = candidate.config, candidate.sizes, candidate.config.model
  stages, chunks = sizes["stage"], config.pipeline.chunks
  bound = roofline(config, candidate.chips, sizes)
  width = (model.moe.width or model.mlp_width) / sizes["tensor"]
  head = 2 * model.width * model.vocab_size / forward_flops_per_token(model, model.max_seq_len)
  stacked = stacked_layers(model)
  fullest = math.ceil(stacked / (stages * chunks)) * stages * chunks / stacked
  narrowness = (1 + 128 / width) * (1 + _TOKENS / micro_batch_tokens(config, sizes))
  busy_s = bound.compute_s / _SHARE * narrowness * (fullest + head * (stages - 1))
  busy_s += _tiles_s(candidate, bound.compute_s / bound.model_s)
  idle = _bubble(config.pipeline.schedule, stages, config.train.grad_accum_steps, chunks)
  work_s = busy_s / (1 - idle) + bound.hbm_s + _elementwise_s(candidate)
  slow = slow_axes(config, candidate.chips, sizes)
  sent = [(one, sent_s(one, candidate.chips.chip, slow)) for one in collective_bytes(config, sizes)]
  hidden_s = sum(_hidden(collective) * seconds for collective, seconds in sent)
  step_s = work_s + sum(seconds for _, seconds in sent) - min(hidden_s, work_s)
  return Estimate(step_s, bound.model_s / step_s)


def _hidden(collective: CollectiveBytes) -> float:
  """Share of a collective's seconds that work hides."""
  return 0.0 if collective.axis in _AWAITED or collective.kind in _SUMS else _HIDDEN


def _elementwise_s(candidate: Candidate) -> float:
  """Summing the head's gradient, fp32, for every chunk but the first; what experts' tokens take."""
  config, model, chip = candidate.config, candidate.config.model, candidate.chips.chip
  local, times = model.max_seq_len / candidate.sizes["context"], config.train.grad_accum_steps
  chunks = math.ceil(local / min(config.loss.chunk or local, local))
  table = 4 * model.width * model.vocab_size / candidate.sizes["tensor"]
  moved = times * (chunks - 1) * 2 * table
  if model.moe.experts:
    layers = stacked_layers(model) / candidate.sizes["stage"] * times
    moved += layers * _PASSES * layer_bytes(config, candidate.sizes)
  return moved * chip.devices / chip.hbm_rate


def _tiles_s(candidate: Candidate, recompute: float) -> float:
  """What attention costs beyond its products: masked halves of tiles, and a step for each tile."""
  model, t = candidate.config.model, candidate.config.model.max_seq_len
  tile, sequences = splash_tile(model.attention.block, t), candidate.config.data.batch_size
  masked = t * tile / 2 if model.causal else 0
  tiles = (t * t / 2 + masked if model.causal else t * t) / tile**2
  peak = candidate.chips.chip.peak(model.dtype)
  head_s = 4 * model.dims["h"] * masked / peak + tiles * _TILE_STEP_S  # of one head of a layer
  return 3 * recompute * sequences / candidate.chips.chips * model.layers * model.heads * head_s


@functools.cache
def _bubble(kind: str, stages: int, micro_batches: int, chunks: int) -> float:
  """Idle share of the stages; the gradient by the input takes two, as the forward is done again."""
  if stages == 1:
    return 0.0
  schedule = make_schedule(kind, stages, micro_batches, chunks)
  return schedule.bubble_fraction(forward=1, backward=2, weight=1)
