"""The arithmetic that textbooks print: 6 · N · D, chip hours, dollars, rooflines, decoding."""

import dataclasses

import jax

from llmjax.core.chips import Chip, Topology
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import cache_bytes_per_token, forward_flops_per_token
from llmjax.models.model import decoding_weights
from llmjax.parallel.mesh import AXES
from llmjax.planning.cost import memory, step_flops
from llmjax.planning.trace import DTYPE_BYTES
from llmjax.planning.traffic import CollectiveBytes, collective_bytes
from llmjax.training.config import Config

HOUR_S, DAY_S = 3600, 86_400


def training_flops(weights: float, tokens: float) -> float:
  """Counts training by the rule of thumb 6 · N · D.

  GPT-3: 6 · 174.6e9 · 300e9 = 3.14e23.
  Source: Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1.
  """
  return 6 * weights * tokens


def steps_for(tokens: float, batch_size: int, length: int) -> int:
  """Counts the steps that read `tokens` in batches of `batch_size` sequences of `length`."""
  return round(tokens / (batch_size * length))


def chip_hours(flops: float, chip: Chip, dtype: str = "bfloat16", mfu: float = 1.0) -> float:
  """Hours of one chip for a number of FLOPs at a share `mfu` of its peak."""
  return flops / (chip.peak(dtype) * mfu) / HOUR_S


def rent_usd(chip: Chip, chips: int, hours: float, usd_per_hour: float = 0.0) -> float:
  """Dollars for `chips` over `hours`, at the list price if none is given."""
  return chips * hours * (usd_per_hour or chip.usd_per_hour)


@dataclasses.dataclass(frozen=True)
class Bill:
  """What a run takes.

  Attributes:
    days: of all chips.
    usd: at the list price, or the one given.
    kwh: of the chips alone; 0 where no power is published.
    tokens_per_day: read.
  """

  days: float
  usd: float
  kwh: float
  tokens_per_day: float


def bill(topology: Topology, tokens: float, tokens_per_s: float, usd_per_hour: float = 0.0) -> Bill:
  """Adds up training time, dollars and energy of reading `tokens` at a rate."""
  hours = tokens / tokens_per_s / HOUR_S
  return Bill(
    hours * HOUR_S / DAY_S, rent_usd(topology.chip, topology.chips, hours, usd_per_hour),
    topology.chip.watts * topology.chips * hours / 1000, tokens_per_s * DAY_S,
  )


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Least seconds of a step by what could hold it up, all chips working at their peaks.

  Attributes:
    compute_s: products, remat's included.
    hbm_s: weights and optimizer state in and out of memory once, gradients and what layers keep
      once for each micro-batch, and the weights twice for each.
    ici_s: what links inside a slice carry.
    dcn_s: what the network between slices carries.
    model_s: the model's own products alone.
  """

  compute_s: float
  hbm_s: float
  ici_s: float
  dcn_s: float
  model_s: float

  @property
  def step_s(self) -> float:
    """The longest of them: all overlap."""
    return max(self.compute_s, self.hbm_s, self.ici_s, self.dcn_s)

  @property
  def bound(self) -> str:
    """Which it is: compute, hbm, ici or dcn."""
    return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, f"{name}_s"))

  @property
  def mfu(self) -> float:
    """Share of the chips' peak that the model's own FLOPs are."""
    return self.model_s / self.step_s


def roofline(config: Config, topology: Topology, sizes: dict[str, int]) -> Roofline:
  """Bounds a step's time from below.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    topology: chips.
    sizes: of every mesh axis; their product is the number of devices.
  Returns:
    Seconds by what could hold the step up.
  Source: Austin et al. 2025, "How to Scale Your Model", ch. 3 and 5.
  """
  chip = topology.chip
  model_flops, recomputed = step_flops(config, sizes)
  rate = chip.peak(config.model.dtype) * topology.chips
  held, times = memory(config, sizes, chip), config.train.grad_accum_steps
  moved = 2 * (held.weights + held.optimizer)
  moved += 2 * times * (held.weights + held.gradients + held.sums + held.activations)
  sent = collective_bytes(config, sizes)
  slow = slow_axes(config, topology, sizes)
  return Roofline(
    compute_s=(model_flops + recomputed) / rate,
    hbm_s=moved * chip.devices / chip.hbm_rate,
    ici_s=sum(sent_s(one, chip, slow) for one in sent if one.axis not in slow),
    dcn_s=sum(sent_s(one, chip, slow) for one in sent if one.axis in slow),
    model_s=model_flops / rate,
  )


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


def sent_s(sent: CollectiveBytes, chip: Chip, slow: set[str]) -> float:
  """Seconds of a ring over one dimension of the torus, both ways at once, or of the slow network.

  Args:
    slow: axes whose bytes take the network, as `slow_axes` names them.
  """
  if sent.axis in slow:
    return sent.bytes / chip.dcn_rate
  return sent.bytes * chip.devices / (min(2, chip.links) * chip.link_rate)


@dataclasses.dataclass(frozen=True)
class Serving:
  """What writing text costs at least: weights and cache are read once for each token.

  Attributes:
    prefill_s: seconds of one batch of prompts.
    token_s: seconds of one token of every sequence.
    cache_bytes: of all sequences, on all devices.
    device_bytes: weights and cache of one device.
  """

  prefill_s: float
  token_s: float
  cache_bytes: float
  device_bytes: float


def serving(
  model: ModelConfig, topology: Topology, batch_size: int, prompt: int, length: int
) -> Serving:
  """Bounds prefill and decoding from below.

  Args:
    model: architecture; its dtype is that of the cache, and of weights that are plain arrays.
    topology: chips, over which weights and cache are spread evenly.
    batch_size: sequences at once.
    prompt: tokens of each prompt.
    length: tokens in the cache of a sequence, on average over what is written.
  Source: Pope et al. 2022, arXiv:2211.05102, sec. 2.
  """
  chip, size = topology.chip, DTYPE_BYTES[model.dtype]
  rate, read_rate = chip.peak(model.dtype) * topology.chips, chip.hbm_rate * topology.chips
  cache = cache_bytes_per_token(model, size) * length * batch_size
  weights = jax.tree.leaves(jax.eval_shape(decoding_weights, abstract(model)))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in weights) + cache
  read_s = held / read_rate
  token_s = max(read_s, batch_size * forward_flops_per_token(model, length) / rate)
  prefill_s = batch_size * prompt * forward_flops_per_token(model, prompt) / rate
  return Serving(max(prefill_s, read_s), token_s, cache, held / topology.devices)
