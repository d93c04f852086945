"""The arithmetic that textbooks print: 6 · N · D, chip hours, dollars, bounds of decoding."""

import dataclasses

import jax

from llmjax.core.chips import Chip, Topology, topology
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import cache_bytes_per_token, forward_flops_per_token
from llmjax.models.model import decoding_weights
from llmjax.planning.trace import DTYPE_BYTES

HOUR_S, DAY_S = 3600, 86_400


def training_flops(weights: float, tokens: float) -> float:
  """Counts training by the rule of thumb 6 · N · D.

  GPT-3: 6 · 174.6e9 · 300e9 = 3.14e23.
  Source: Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1.
  """
  return 6 * weights * tokens


def chip_hours(flops: float, chip: Chip, dtype: str = "bfloat16", mfu: float = 1.0) -> float:
  """Hours of one chip for a number of FLOPs at a share `mfu` of its peak."""
  return flops / (chip.peak(dtype) * mfu) / HOUR_S


def rent_usd(chip: Chip, chips: int, hours: float) -> float:
  """Dollars for `chips` over `hours` at the chip's price."""
  return chips * hours * chip.usd_per_hour


def priced(where: str, slices: int = 1, usd_per_hour: float | None = None) -> Topology:
  """Reads a topology whose chips cost `usd_per_hour`, by default the list price.

  Raises:
    UserError: as `topology`.
  """
  chips = topology(where, slices)
  price = usd_per_hour or chips.chip.usd_per_hour
  return dataclasses.replace(chips, chip=dataclasses.replace(chips.chip, usd_per_hour=price))


def costs(chips: Topology, tokens_per_s: float, run_tokens: float = 0) -> dict:
  """Adds up what tokens cost, and all tokens of a run if there are some.

  Args:
    chips: at their price.
    tokens_per_s: read or written by all of them.
    run_tokens: of the whole run.
  Returns:
    `tokens_per_s`, `tokens_per_day`, `cost_usd_per_btokens`, `kwh_per_btokens` of the chips alone;
    of a run `run_days`, `run_cost_usd`, `run_kwh`. None stands for a cost whose rate, dollars or
    watts, is not published.
  """

  def bill(tokens: float) -> tuple:
    hours = tokens / tokens_per_s / HOUR_S
    kwh = chips.chip.watts * chips.chips * hours / 1000
    return hours * HOUR_S / DAY_S, rent_usd(chips.chip, chips.chips, hours) or None, kwh or None

  rates = zip(("cost_usd_per_btokens", "kwh_per_btokens"), bill(1e9)[1:], strict=True)
  found = {"tokens_per_s": tokens_per_s, "tokens_per_day": tokens_per_s * DAY_S, **dict(rates)}
  if run_tokens:
    found |= zip(("run_days", "run_cost_usd", "run_kwh"), bill(run_tokens), strict=True)
  return found


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
  model: ModelConfig, chips: Topology, batch_size: int, prompt: int, length: int
) -> Serving:
  """Bounds prefill and decoding from below.

  Args:
    model: architecture; its dtype is that of the cache, and of weights that are plain arrays.
    chips: over which weights and cache are spread evenly.
    batch_size: sequences at once.
    prompt: tokens of each prompt.
    length: tokens in the cache of a sequence, on average over what is written.
  Source: Pope et al. 2022, arXiv:2211.05102, sec. 2.
  """
  rate, read_rate = chips.chip.peak(model.dtype) * chips.chips, chips.chip.hbm_rate * chips.chips
  cache = cache_bytes_per_token(model, DTYPE_BYTES[model.dtype]) * length * batch_size
  weights = jax.tree.leaves(jax.eval_shape(decoding_weights, abstract(model)))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in weights) + cache
  read_s = held / read_rate
  token_s = max(read_s, batch_size * forward_flops_per_token(model, length) / rate)
  prefill_s = batch_size * prompt * forward_flops_per_token(model, prompt) / rate
  return Serving(max(prefill_s, read_s), token_s, cache, held / chips.devices)
