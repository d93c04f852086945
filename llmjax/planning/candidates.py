"""What a search chooses from: meshes that divide a model, and settings that cost time or memory."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from llmjax.core.chips import Topology
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.nn.attention.platform_kernels import splash_tile
from llmjax.parallel.mesh import AXES
from llmjax.parallel.rules import WEIGHTS, ZERO, check_layout, weight_shardings
from llmjax.planning.cost import stacked_layers
from llmjax.planning.estimate import Estimate, estimate
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

  @functools.cached_property
  def estimate(self) -> Estimate:
    """The step by formula."""
    return estimate(self.config, self.chips, self.sizes)

  @property
  def step_s(self) -> float:
    """Its seconds by formula."""
    return self.estimate.step_s

  @property
  def peak_bytes(self) -> float:
    """Most that a device holds, by formula."""
    return self.estimate.memory.peak

  def fits(self, share: float = 1.0) -> bool:
    """Whether the step fits by formula into a share of a device's memory."""
    return self.peak_bytes <= share * self.chips.chip.hbm_bytes / self.chips.chip.devices

  def but(self, **changes) -> "Candidate":
    """Changes a candidate further, by dotted key."""
    config = change(self.config, changes)
    return dataclasses.replace(self, config=config, changes=self.changes | changes)


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
  """Whether the sharding rules of weights take a mesh."""
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
    yield from of_mesh(config, chips, sizes, sizes.pop("across"))


def of_mesh(
  config: Config, chips: Topology, sizes: dict[str, int], across: str, remat: tuple = ()
) -> Iterator[Candidate]:
  """Lists one mesh with all settings, `remat` all or those given; arguments as of `candidates`."""
  mesh = {f"mesh.{axis}": size for axis, size in sizes.items()}
  mesh |= {"mesh.across": across, "mesh.slices": 0}
  mesh |= {key: value for axis, key, value in unread() if sizes[axis] == 1}
  for settings in _settings(config, sizes, remat or _REMAT):
    changes = mesh | settings
    yield Candidate(change(config, changes), changes, chips, sizes)


def _settings(config: Config, sizes: dict[str, int], all_remat: tuple) -> Iterator[dict]:
  stages = sizes["stage"]
  sequences = config.data.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
  times = [
    n for n in _divisors(sequences) if (stages == 1 or n >= stages)
    and n <= max(_MICRO_BATCHES, 4 * stages)
  ]
  zero_stages = ZERO if sizes["fsdp"] > 1 else (3,)
  for parts, zero, remat in itertools.product(times, zero_stages, all_remat):
    settings = {"train.grad_accum_steps": parts, "train.zero_stage": zero, "model.remat": remat}
    summed = zero == 3 and sizes["fsdp"] > 1
    settings["train.grad_reduce_dtype"] = config.train.grad_reduce_dtype if summed else "float32"
    for schedule, chunks in _SCHEDULES if stages > 1 else ():
      rounds = parts % stages == 0 and stacked_layers(config.model) % (stages * chunks) == 0
      if chunks == 1 or rounds:
        yield settings | {"pipeline.schedule": schedule, "pipeline.chunks": chunks}
    if stages == 1:
      yield settings


def refined(candidate: Candidate) -> Iterator[Candidate]:
  """Lists a candidate with attention blocks that make other tiles, other chunks, other saved names.

  The search does it for the best of some meshes alone: of all it would be a hundred times as many.
  """
  model, loss = candidate.config.model, candidate.config.loss
  local, tiles = model.max_seq_len // candidate.sizes["context"], {}
  for block in (model.attention.block, *_BLOCKS):
    tiles.setdefault(splash_tile(block, model.max_seq_len), block)
  chunks = {loss.chunk, *(size for size in _CHUNKS if size <= local)}
  saved = {model.remat}
  if not saved & {"none", "dots", "offload"}:
    special = {(): "full", _SAVED: "save_projections"}
    for kept in itertools.product((True, False), repeat=len(_SAVED)):
      names = tuple(itertools.compress(_SAVED, kept))
      saved.add(special.get(names, "+".join(names)))
  for block, chunk, remat in itertools.product(tiles.values(), chunks, sorted(saved)):
    yield candidate.but(
      **{"model.attention.block": block, "loss.chunk": chunk, "model.remat": remat}
    )
