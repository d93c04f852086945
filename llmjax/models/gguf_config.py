"""GGUF metadata → `ModelConfig`: what the tensors show is read off them, the rest off the keys.

Which norms, biases and heads a model has is seen by which tensors there are; an architecture's name
decides only what its files leave unsaid.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

from llmjax.core import config as configs
from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.nn.position import PositionConfig, rope_frequencies

# What files of an architecture leave unsaid, by our keys; those of windows hold where there is one.
ARCHITECTURES = {
  "bert": {"kind": "encoder", "activation": "gelu", "embed.head_bias": True},
  "gemma": {"activation": "geglu_tanh"},
  "gemma2": {"activation": "geglu_tanh", "attention.pattern": ("window", "full")},
  "gemma3": {
    "activation": "geglu_tanh",
    "attention.pattern": ("window",) * 5 + ("full",),
    "position.local_theta": 10_000.0,
  },
  "gpt2": {"activation": "gelu_tanh"},
  "llama": {"position.layout": "interleaved"},
  "olmo2": {},
  "phi3": {"attention.pattern": ("window",)},
  "qwen2": {},
  "qwen3": {},
}
_WINDOWS = ("attention.pattern", "position.local_theta")
_COUNTS = {
  "layers": "block_count",
  "width": "embedding_length",
  "heads": "attention.head_count",
  "mlp_width": "feed_forward_length",
}
# Layers of the one size whose attention scores are divided by √(d / n), not √h.
_LARGE = {"gemma2": 46, "gemma3": 62}


class Metadata:
  """A file's keys, those of its architecture without their prefix."""

  def __init__(self, values: Mapping):
    self.values = values
    self.name = values.get("general.architecture")
    if self.name not in ARCHITECTURES:
      known = ", ".join(sorted(ARCHITECTURES))
      raise UserError(f"GGUF architecture {self.name!r} is not one of {known}")

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
  values = {"dtype": "float32"} | ARCHITECTURES[metadata.name]
  values |= {ours: metadata.number(theirs) for ours, theirs in _COUNTS.items()}
  width, heads = values["width"], values["heads"]
  h = metadata.get("attention.key_length", 0) or width // heads
  values |= {
    "kv_heads": metadata.get("attention.head_count_kv", heads),
    "head_dim": h,
    "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    "vocab_size": shapes["token_embd.weight"][0],
    "tie_embeddings": "output.weight" not in shapes,
    "embed.types": shapes.get("token_types.weight", (0,))[0],
    "embed.norm": "token_embd_norm.weight" in shapes,
    "embed.logit_softcap": metadata.get("final_logit_softcapping", 0.0),
    "attention.softcap": metadata.get("attn_logit_softcapping", 0.0),
    "attention.window": metadata.get("attention.sliding_window", 0),
  }
  if "position_embd.weight" in shapes:
    values |= {"position.kind": "learned", "context": shapes["position_embd.weight"][0]}
  else:
    values |= {"context": metadata.number("context_length")} | _rope(metadata, h)
  values |= _seen(shapes, h) | _norm(metadata, shapes)
  if not values["attention.window"]:
    values = {key: value for key, value in values.items() if key not in _WINDOWS}
  if metadata.name.startswith("gemma"):
    values["embed.scale"] = math.sqrt(width)
  if _LARGE.get(metadata.name) == values["layers"]:
    values["attention.scale"] = (width // heads) ** -0.5
  return configs.freeze(unflatten_dict(values, sep="."), ModelConfig, "model.")


def _refuse(metadata: Metadata, shapes):
  """Refuses what a file says and this project would have to ignore."""
  if metadata.get("expert_count"):
    raise UserError(f"this GGUF file's {metadata.name} is a mixture of experts, which is not known")
  if "rope_factors_long.weight" in shapes:
    raise UserError("this GGUF file scales its rotary positions by longrope, which is not known")
  if "token_embd.weight" not in shapes:
    raise UserError("this GGUF file holds no tensor 'token_embd.weight': it is not a whole model")
  window = metadata.get("attention.sliding_window")
  if window and "attention.pattern" not in ARCHITECTURES[metadata.name]:
    raise UserError(f"a sliding window in GGUF architecture {metadata.name} is not known")


def _seen(shapes, head_dim: int) -> dict:
  """What the tensors of the first layer's attention say."""
  bias = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
  normed = shapes.get("blk.0.attn_q_norm.weight")
  return {
    "attention.qk_norm": "none" if not normed else "head" if normed == (head_dim,) else "all",
    "attention.bias": "all" if "blk.0.attn_output.bias" in shapes else "qkv" if bias else "none",
  }


def _norm(metadata: Metadata, shapes) -> dict:
  before, after, post = (
    f"blk.0.{name}.weight" in shapes
    for name in ("attn_norm", "post_attention_norm", "attn_output_norm")
  )
  inside = "pre" if not after else "sandwich" if before else "output"
  made = {"norm.place": "post" if post else inside}
  eps = metadata.get("attention.layer_norm_rms_epsilon")
  if eps is not None:
    return made | {"norm.eps": eps}
  eps = metadata.get("attention.layer_norm_epsilon", 1e-5)
  bias = any(name.endswith("norm.bias") for name in shapes)
  return made | {"norm.kind": "layer", "norm.eps": eps, "norm.bias": bias}


def _rope(metadata: Metadata, head_dim: int) -> dict:
  made = {
    "position.theta": metadata.get("rope.freq_base", 10_000.0),
    "position.fraction": metadata.get("rope.dimension_count", head_dim) / head_dim,
  }
  kind = metadata.get("rope.scaling.type", "none")
  factor = metadata.get("rope.scaling.factor", 1.0)
  if kind == "none" or factor == 1:
    return made
  made |= {"position.scaling": kind, "position.factor": factor}
  if kind == "linear":
    return made
  if kind != "yarn":
    raise UserError(f"GGUF rope scaling {kind!r} is not one of linear, none, yarn")
  share = metadata.get("rope.scaling.attn_factor", 1.0)
  return made | {
    "position.original_context": metadata.number("rope.scaling.original_context_length"),
    "position.beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
    "position.beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
    "position.attention_factor": share * (0.1 * math.log(factor) + 1),
  }


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
