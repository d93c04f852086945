"""GGUF metadata → `ModelConfig`: what the tensors show is read off them, the rest off the keys.

Which norms, biases and heads a model has is seen by which tensors there are; an architecture's name
decides only what its files leave unsaid.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.nn.attention import AttentionConfig
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig, rope_frequencies


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a file of an architecture leaves unsaid.

  Attributes:
    kind: decoder or encoder.
    activation: of the feed-forward layer.
    layout: rope's channel pairs.
    pattern: kinds of layers where the file names a window.
    local_theta: rope's base in window layers; 0 means the file's.
    scaled: token vectors are multiplied by √d.
    large: layers of the one size whose attention scores are divided by √(d / n), not √h.
  """

  kind: str = "decoder"
  activation: str = "swiglu"
  layout: str = "half"
  pattern: tuple = ("full",)
  local_theta: float = 0.0
  scaled: bool = False
  large: int = 0


_GEMMA = Architecture(activation="geglu_tanh", scaled=True)
ARCHITECTURES = {
  "bert": Architecture(kind="encoder", activation="gelu"),
  "gemma": _GEMMA,
  "gemma2": dataclasses.replace(_GEMMA, pattern=("window", "full"), large=46),
  "gemma3": dataclasses.replace(
    _GEMMA, pattern=("window",) * 5 + ("full",), local_theta=10_000.0, large=62
  ),
  "gpt2": Architecture(activation="gelu_tanh"),
  "llama": Architecture(layout="interleaved"),
  "olmo2": Architecture(),
  "phi3": Architecture(pattern=("window",)),
  "qwen2": Architecture(),
  "qwen3": Architecture(),
}


class Metadata:
  """A file's keys, those of its architecture without their prefix."""

  def __init__(self, values: Mapping):
    self.values = values
    self.name = values.get("general.architecture")
    if self.name not in ARCHITECTURES:
      known = ", ".join(sorted(ARCHITECTURES))
      raise UserError(f"GGUF architecture {self.name!r} is not one of {known}")
    self.architecture = ARCHITECTURES[self.name]

  def get(self, key: str, default=None):
    """The value of a key, or a default; 32-bit floats as they were written, 1e-5 as 1e-5."""
    value = self.values.get(f"{self.name}.{key}", default)
    return float(str(np.float32(value))) if isinstance(value, float) else value

  def number(self, key: str) -> int:
    """A count that must be there, one for all layers."""
    value = self.get(key)
    if not isinstance(value, int):
      found = "missing" if value is None else f"{value!r}, not one number"
      raise UserError(f"GGUF key '{self.name}.{key}' is {found}")
    return value


def config_of(metadata: Metadata, shapes: Mapping[str, tuple]) -> ModelConfig:
  """Reads a file's architecture; arithmetic is fp32.

  Args:
    metadata: the file's keys.
    shapes: tensor name → shape, the dimension that is multiplied last.
  Raises:
    UserError: an architecture, or a variant of one, that is not known here.
  """
  _refuse(metadata, shapes)
  known = metadata.architecture
  layers, width = metadata.number("block_count"), metadata.number("embedding_length")
  heads = metadata.number("attention.head_count")
  head_dim = metadata.get("attention.key_length", 0) or width // heads
  learned = "position_embd.weight" in shapes
  return ModelConfig(
    kind=known.kind,
    layers=layers,
    width=width,
    heads=heads,
    kv_heads=metadata.get("attention.head_count_kv", heads),
    head_dim=head_dim,
    mlp_width=metadata.number("feed_forward_length"),
    activation=known.activation,
    mlp_bias="blk.0.ffn_up.bias" in shapes,
    vocab_size=shapes["token_embd.weight"][0],
    context=shapes["position_embd.weight"][0] if learned else metadata.number("context_length"),
    tie_embeddings="output.weight" not in shapes,
    dtype="float32",
    attention=_attention(metadata, shapes, (width // heads) ** -0.5, head_dim),
    position=PositionConfig(kind="learned") if learned else _position(metadata, head_dim),
    norm=_norm(metadata, shapes),
    embed=EmbedConfig(
      scale=math.sqrt(width) if known.scaled else 1.0,
      types=shapes.get("token_types.weight", (0,))[0],
      norm="token_embd_norm.weight" in shapes,
      head_bias=known.kind == "encoder",
      logit_softcap=metadata.get("final_logit_softcapping", 0.0),
    ),
  )


def _refuse(metadata: Metadata, shapes):
  """Refuses what a file says and this project would have to ignore."""
  if metadata.get("expert_count"):
    raise UserError(f"this GGUF file's {metadata.name} is a mixture of experts, which is not known")
  if "rope_factors_long.weight" in shapes:
    raise UserError("this GGUF file scales its rotary positions by longrope, which is not known")
  if "token_embd.weight" not in shapes:
    raise UserError("this GGUF file holds no tensor 'token_embd.weight': it is not a whole model")
  window = metadata.get("attention.sliding_window")
  if window and "window" not in metadata.architecture.pattern:
    raise UserError(f"a sliding window in GGUF architecture {metadata.name} is not known")


def _attention(metadata: Metadata, shapes, wide_scale: float, head_dim: int) -> AttentionConfig:
  known = metadata.architecture
  bias = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
  normed = shapes.get("blk.0.attn_q_norm.weight")
  window = metadata.get("attention.sliding_window", 0)
  large = known.large == metadata.number("block_count")
  return AttentionConfig(
    pattern=known.pattern if window else ("full",),
    window=window,
    softcap=metadata.get("attn_logit_softcapping", 0.0),
    qk_norm="none" if normed is None else "head" if normed == (head_dim,) else "all",
    bias="all" if "blk.0.attn_output.bias" in shapes else "qkv" if bias else "none",
    scale=wide_scale if large else 0.0,
  )


def _norm(metadata: Metadata, shapes) -> NormConfig:
  if "blk.0.attn_output_norm.weight" in shapes:
    place = "post"
  elif "blk.0.post_attention_norm.weight" in shapes:
    place = "sandwich" if "blk.0.attn_norm.weight" in shapes else "output"
  else:
    place = "pre"
  eps = metadata.get("attention.layer_norm_rms_epsilon")
  if eps is not None:
    return NormConfig(place=place, eps=eps)
  bias = any(name.endswith("norm.bias") for name in shapes)
  eps = metadata.get("attention.layer_norm_epsilon", 1e-5)
  return NormConfig(kind="layer", place=place, eps=eps, bias=bias)


def _position(metadata: Metadata, head_dim: int) -> PositionConfig:
  known = metadata.architecture
  plain = PositionConfig(
    theta=metadata.get("rope.freq_base", 10_000.0),
    local_theta=known.local_theta if metadata.get("attention.sliding_window") else 0.0,
    fraction=metadata.get("rope.dimension_count", head_dim) / head_dim,
    layout=known.layout,
  )
  kind = metadata.get("rope.scaling.type", "none")
  factor = metadata.get("rope.scaling.factor", 1.0)
  if kind == "none" or factor == 1:
    return plain
  if kind == "linear":
    return dataclasses.replace(plain, scaling="linear", factor=factor)
  if kind != "yarn":
    raise UserError(f"GGUF rope scaling {kind!r} is not one of linear, none, yarn")
  share = metadata.get("rope.scaling.attn_factor", 1.0)
  return dataclasses.replace(
    plain,
    scaling="yarn",
    factor=factor,
    original_context=metadata.number("rope.scaling.original_context_length"),
    beta_fast=metadata.get("rope.scaling.yarn_beta_fast", 32.0),
    beta_slow=metadata.get("rope.scaling.yarn_beta_slow", 1.0),
    attention_factor=share * (0.1 * math.log(factor) + 1),
  )


def with_divisors(position: PositionConfig, head_dim: int, divisors: np.ndarray) -> PositionConfig:
  """Finds the llama3 scaling whose frequencies a file gives as divisors of the plain ones.

  Between full stretch and none a share of turns - low over high - low is kept; low, high and the
  original context are known up to a common factor, so low is taken to be 1.

  Args:
    position: without scaling.
    head_dim: h.
    divisors: of the plain frequencies, [r/2].
  Returns:
    The position with that scaling.
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
    made = dataclasses.replace(
      position,
      scaling="llama3",
      factor=factor,
      original_context=max(1, round(2 * math.pi * slope * (high - 1))),
      high_freq_factor=max(round(high, 3), 1.001),
    )
    if np.allclose(rope_frequencies(made, head_dim) * divisors, plain, rtol=1e-4):
      return made
  raise UserError("this GGUF file's rope_freqs are no scaling that is known here (llama3)")
