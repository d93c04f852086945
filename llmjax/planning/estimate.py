"""A training step by formula: its memory, what it sends, its seconds, and a lower bound of them."""

import dataclasses
import functools
import math

from llmjax.core.chips import Chip, Topology
from llmjax.models.formulas import forward_flops_per_token
from llmjax.nn.attention.platform_kernels import splash_tile
from llmjax.parallel.collectives import Collective
from llmjax.parallel.mesh import AXES
from llmjax.parallel.schedules import make_schedule
from llmjax.planning.cost import (
  Memory,
  layer_bytes,
  memory,
  micro_batch_tokens,
  stacked_layers,
  step_flops,
)
from llmjax.planning.traffic import collective_bytes
from llmjax.training.config import Config

_SHARE = 0.92  # of the peak that large products reach, with the elementwise work between them;
_TOKENS = 500  # half of it where a device has so many tokens of a micro-batch
_TILE_STEP_S = 0.35e-6  # of a kernel's step over one tile, whatever it holds
_PASSES = 16  # times that arrays of experts' tokens go through memory
_HIDDEN = 0.9  # share of sending that work hides, but all wait
_AWAITED = {"tensor", "expert"}  # along these axes
_SUMS = ("reduce-scatter", "all-reduce")  # and for sums of gradients


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One step on all chips.

  Attributes:
    step_s: what it is estimated to take.
    model_s: what the model's own products take at the chips' peak.
    roofline: seconds by what could hold the step up, each alone and at its peak: `compute_s`,
      products, remat's included; `hbm_s`, weights and optimizer state in and out of memory once,
      gradients and what layers keep once for each micro-batch, and the weights twice for each;
      `ici_s`, what links inside a slice carry; `dcn_s`, what the network between slices carries.
    memory: of a device.
    sends: what a device passes on.
  """

  step_s: float
  model_s: float
  roofline: dict[str, float]
  memory: Memory
  sends: list[Collective]

  @property
  def least_s(self) -> float:
    """The roofline's lower bound of a step: all four overlap perfectly."""
    return max(self.roofline.values())

  @property
  def mfu(self) -> float:
    """Share of the chips' peak that the model's own FLOPs are."""
    return self.model_s / self.step_s


def estimate(config: Config, topology: Topology, sizes: dict[str, int]) -> Estimate:
  """Estimates a step; `step_s` puts candidates in order and is never below the roofline.

  Assumed: products reach 0.92 of peak, less where a device's share of the feed-forward width is
  narrow or its tokens are few; a masked tile of attention is computed whole, and each tile costs
  0.35 µs more; what the roofline has pass through memory comes on top, the head's gradient with
  each chunk of logits, and elementwise work on experts' tokens; stages wait for the fullest, and
  the last has the head. Work hides 0.9 of what is sent; of activations between `tensor`'s halves,
  tokens on their way to experts and sums of gradients nothing, as in the programs that the TPU's
  compiler makes (docs/LOG.md).

  Args:
    config: the experiment, `model.vocab_size` filled in.
    topology: chips.
    sizes: of every mesh axis; their product is the number of devices.
  Source: the roofline: Austin et al. 2025, "How to Scale Your Model", ch. 3 and 5.
  """
  chip, times = topology.chip, config.train.grad_accum_steps
  model_flops, recomputed = step_flops(config, sizes)
  rate = chip.peak(config.model.dtype) * topology.chips
  compute_s, model_s = (model_flops + recomputed) / rate, model_flops / rate
  held, sends = memory(config, sizes, chip), collective_bytes(config, sizes)
  moved = 2 * (held.weights + held.optimizer)
  moved += 2 * times * (held.weights + held.gradients + held.sums + held.activations)
  hbm_s = moved * chip.devices / chip.hbm_rate
  slow = slow_axes(config, topology, sizes)
  sent_s = [_sent_s(one, chip, slow) for one in sends]
  dcn_s = sum(seconds for one, seconds in zip(sends, sent_s, strict=True) if slow & {*one.axes})
  hidden_s = sum(_hidden(one) * seconds for one, seconds in zip(sends, sent_s, strict=True))
  work_s = _busy_s(config, topology, sizes, compute_s, compute_s / model_s) + hbm_s
  work_s += _elementwise_s(config, chip, sizes)
  roofline = {
    "compute_s": compute_s, "hbm_s": hbm_s, "ici_s": sum(sent_s) - dcn_s, "dcn_s": dcn_s
  }
  step_s = work_s + sum(sent_s) - min(hidden_s, work_s)
  return Estimate(step_s, model_s, roofline, held, sends)


def slow_axes(config: Config, topology: Topology, sizes: dict[str, int]) -> set[str]:
  """Names the axes that leave a slice, or a GPU's node: neighbours on the last ones share it."""
  if topology.chip.sizes:
    return {config.mesh.across} if topology.slices > 1 else set()
  inside, slow = 1, set()
  for axis in reversed(AXES):
    inside *= sizes[axis]
    if sizes[axis] > 1 and inside > topology.chip.hosts:
      slow.add(axis)
  return slow


def _sent_s(sent: Collective, chip: Chip, slow: set[str]) -> float:
  """Seconds of a ring over one dimension of the torus, both ways, or of the slow network."""
  if slow & {*sent.axes}:
    return sent.bytes / chip.dcn_rate
  return sent.bytes * chip.devices / (min(2, chip.links) * chip.link_rate)


def _hidden(sent: Collective) -> float:
  return 0.0 if {*sent.axes} & _AWAITED or sent.kind in _SUMS else _HIDDEN


def _busy_s(config: Config, topology: Topology, sizes, compute_s: float, recompute: float) -> float:
  """Seconds of products at the rates that they reach, and of stages that idle meanwhile."""
  model, stages, chunks = config.model, sizes["stage"], config.pipeline.chunks
  width = (model.moe.width or model.mlp_width) / sizes["tensor"]
  head = 2 * model.width * model.vocab_size / forward_flops_per_token(model, model.max_seq_len)
  stacked = stacked_layers(model)
  fullest = math.ceil(stacked / (stages * chunks)) * stages * chunks / stacked
  narrowness = (1 + 128 / width) * (1 + _TOKENS / micro_batch_tokens(config, sizes))
  busy_s = compute_s / _SHARE * narrowness * (fullest + head * (stages - 1))
  busy_s += _tiles_s(config, topology, recompute)
  return busy_s / (
    1 - _bubble(config.pipeline.schedule, stages, config.train.grad_accum_steps, chunks)
  )


def _tiles_s(config: Config, topology: Topology, recompute: float) -> float:
  """What attention costs beyond its products: masked halves of tiles, and a step for each tile."""
  model, t = config.model, config.model.max_seq_len
  tile = splash_tile(model.attention.block, t)
  masked = t * tile / 2 if model.causal else 0
  tiles = (t * t / 2 + masked if model.causal else t * t) / tile**2
  peak = topology.chip.peak(model.dtype)
  head_s = 4 * model.dims["h"] * masked / peak + tiles * _TILE_STEP_S  # of one head of a layer
  heads = config.data.batch_size / topology.chips * model.layers * model.heads
  return 3 * recompute * heads * head_s


def _elementwise_s(config: Config, chip: Chip, sizes: dict[str, int]) -> float:
  """Summing the head's gradient, fp32, for every chunk but the first; what experts' tokens take."""
  model, times = config.model, config.train.grad_accum_steps
  local = model.max_seq_len / sizes["context"]
  chunks = math.ceil(local / min(config.loss.chunk or local, local))
  moved = times * (chunks - 1) * 2 * 4 * model.width * model.vocab_size / sizes["tensor"]
  if model.moe.experts:
    layers = stacked_layers(model) / sizes["stage"] * times
    moved += layers * _PASSES * layer_bytes(config, sizes)
  return moved * chip.devices / chip.hbm_rate


@functools.cache
def _bubble(kind: str, stages: int, micro_batches: int, chunks: int) -> float:
  """Idle share of the stages; the gradient by the input takes two, as the forward is done again."""
  if stages == 1:
    return 0.0
  schedule = make_schedule(kind, stages, micro_batches, chunks)
  return schedule.bubble_fraction(forward=1, backward=2, weight=1)
