"""Rotary positions of GGUF files: bases and scalings by keys, or as tensors of divisors."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from llmjax.core.errors import UserError
from llmjax.formats.gguf.keys import Metadata
from llmjax.nn.position import PositionConfig, rope_frequencies

# Tensors that are part of the config: divisors of the angles of pairs of channels.
FREQUENCIES, SHORT, LONG = TENSORS = (
  "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
)


def positions(metadata: Metadata, shapes, factors: Mapping, head_dim: int) -> dict:
  """Reads positions by dotted key, and `max_seq_len` with those that a stretch adds.

  Args:
    factors: those of `TENSORS` that the file has.
  Raises:
    UserError: a scaling that is not known here.
  """
  table = shapes.get("position_embd.weight")
  if table and factors:
    raise UserError("this GGUF file has learned positions as well as rotary ones")
  if table:
    return {"position.kind": "learned", "max_seq_len": table[0]}
  context = metadata.count("context_length")
  fields = {
    "max_seq_len": context,
    "position.theta": metadata.get("rope.freq_base", 10_000.0),
    "position.fraction": metadata.count("rope.dimension_count", head_dim) / head_dim,
  }
  kind = metadata.get("rope.scaling.type", "linear")
  if kind not in ("none", "linear", "yarn", "longrope"):
    raise UserError(f"GGUF rope scaling {kind!r} is not one of linear, none, yarn, longrope")
  factor = metadata.get("rope.scale_linear", 0.0)  # the older name
  factor = metadata.get("rope.scaling.factor", factor) or 1.0
  share = metadata.get("rope.scaling.attn_factor", 1.0)
  original = metadata.count("rope.scaling.original_context_length", 0)
  if kind == "longrope" or factors.keys() & {SHORT, LONG}:
    return fields | _longrope(factors, factor, share, original or context)
  scaled = kind != "none" and factor != 1
  if share != 1 and not (scaled and kind == "yarn"):
    raise UserError(f"GGUF key 'rope.scaling.attn_factor' {share} is known with yarn alone")
  if not scaled:
    return fields
  if factor < 1:
    raise UserError(f"GGUF rope scaling factor {factor} is below 1")
  fields |= {"position.scaling": kind, "position.factor": factor}
  # Gemma 3 gives the context after the stretch, and so does a model that was trained with it.
  stretched = metadata.get("rope.scaling.finetuned", False) or metadata.name == "gemma3"
  if original or not stretched:
    fields["max_seq_len"] = max(context, int((original or context) * factor))
  if kind == "linear":
    return fields
  return fields | {
    "position.original_context": original or context,
    "position.beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
    "position.beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
    "position.attention_factor": share * (0.1 * math.log(factor) + 1),
  }


def _longrope(factors: Mapping, factor: float, share: float, original: int) -> dict:
  if factor != 1 or not {SHORT, LONG} <= factors.keys():
    raise UserError(f"GGUF longrope needs tensors {SHORT!r} and {LONG!r} and no factor")
  return {
    "position.scaling": "longrope",
    "position.original_context": original,
    "position.attention_factor": share,
    "position.divisors": tuple(float(each) for name in (SHORT, LONG) for each in factors[name]),
  }


def with_divisors(position: PositionConfig, head_dim: int, divisors: np.ndarray) -> PositionConfig:
  """Finds the llama3 scaling whose frequencies a file gives as divisors of the plain ones.

  Between full stretch and none the fraction (turns - low) / (high - low) of a frequency is kept;
  low, high and the original context are known up to a common factor, so low is taken to be 1.

  Args:
    position: without scaling.
    divisors: of the plain frequencies, [r/2].
  Raises:
    UserError: no such scaling gives these divisors.
  """
  if np.all(divisors == 1):
    return position
  plain = rope_frequencies(position, head_dim)
  factor = float(divisors.max())
  kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
  ramp = (kept > 1e-6) & (kept < 1 - 1e-6)
  if divisors.shape == plain.shape and ramp.sum() > 1:
    slope, start = np.polyfit(plain[ramp], kept[ramp], 1)
    high = 1 - 1 / start
    original = max(2, round(2 * math.pi * slope * (high - 1)))
    scaled = dataclasses.replace(
      position, scaling="llama3", factor=factor, original_context=original,
      high_freq_factor=max(round(high, 3), 1.001),
    )
    if np.allclose(rope_frequencies(scaled, head_dim) * divisors, plain, rtol=1e-4):
      return scaled
  raise UserError("this GGUF file's rope_freqs are no scaling that is known here (llama3)")
