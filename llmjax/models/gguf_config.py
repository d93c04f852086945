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
from llmjax.models.gguf_keys import Metadata
from llmjax.models.hf_canonical import shortest_pattern
from llmjax.nn.position import PositionConfig, rope_frequencies

# What files of an architecture leave unsaid, by our keys; numbers are llama.cpp's where a key is
# missing. The pattern and the base of rotary positions hold where there is a window; a base of None
# is that of the other layers, unscaled.
ARCHITECTURES = {
  "bert": {
    "kind": "encoder", "activation": "gelu", "embed.head_bias": True, "norm.kind": "layer",
  },
  "gemma": {"activation": "geglu_tanh"},
  "gemma2": {
    "activation": "geglu_tanh",
    "attention.pattern": ("window", "full"),
    "attention.window": 4096,
    "attention.softcap": 50.0,
    "embed.logit_softcap": 30.0,
  },
  "gemma3": {
    "activation": "geglu_tanh",
    "attention.pattern": ("window",) * 5 + ("full",),
    "position.local_theta": 10_000.0,
  },
  "gpt2": {"activation": "gelu_tanh", "norm.kind": "layer"},
  "llama": {"position.layout": "interleaved"},
  "olmo2": {
    "attention.pattern": ("window",) * 3 + ("full",),
    "position.local_theta": None,
  },
  "phi3": {"attention.pattern": ("window",)},
  "qwen2": {},
  "qwen3": {},
}
_COUNTS = {
  "layers": "block_count",
  "width": "embedding_length",
  "heads": "attention.head_count",
  "mlp_width": "feed_forward_length",
}
# Keys that stand for one of ours as they are; 0 is none of it.
_NUMBERS = {
  "attention.window": "attention.sliding_window",
  "attention.softcap": "attn_logit_softcapping",
  "attention.scale": "attention.scale",
  "embed.logit_softcap": "final_logit_softcapping",
}
# Layers of the one size whose attention scores are divided by √(d / n), not √h.
_LARGE = {"gemma2": 46, "gemma3": 62}


def config_of(values: Mapping, shapes: Mapping[str, tuple]) -> ModelConfig:
  """Reads a file's architecture; arithmetic is fp32.

  Args:
    values: the file's keys.
    shapes: tensor name → shape, the dimension that is multiplied last.
  Raises:
    UserError: an architecture, or a variant of one, that is not known here.
  Source: `load_hparams` of llama.cpp's src/llama-model.cpp and src/models.
  """
  metadata = Metadata(values, ARCHITECTURES)
  _refuse(metadata, shapes)
  made = {"dtype": "float32"} | ARCHITECTURES[metadata.name]
  made |= {ours: metadata.count(theirs) for ours, theirs in _COUNTS.items()}
  width, heads = made["width"], made["heads"]
  h = metadata.count("attention.key_length", 0) or width // max(heads, 1)
  _same_heads(metadata, h)
  made |= {
    "kv_heads": metadata.count("attention.head_count_kv", heads),
    "head_dim": h,
    "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    "vocab_size": shapes["token_embd.weight"][0],
    "tie_embeddings": "output.weight" not in shapes,
    "embed.types": shapes.get("token_types.weight", (0,))[0],
    "embed.norm": "token_embd_norm.weight" in shapes,
  }
  if _LARGE.get(metadata.name) == made["layers"]:
    made["attention.scale"] = (width // heads) ** -0.5
  made |= {ours: metadata.get(theirs, made.get(ours, 0)) for ours, theirs in _NUMBERS.items()}
  usual = math.sqrt(width) if metadata.name.startswith("gemma") else 1.0
  made["embed.scale"] = metadata.get("embedding_scale", 0.0) or usual
  causal = made.get("kind") != "encoder"
  if bool(metadata.get("attention.causal", causal)) != causal:
    made["attention.mask"] = "bidirectional" if causal else "causal"
  made |= _positions(metadata, shapes, h) | _seen(shapes, h) | _norm(metadata, shapes, made)
  _window(metadata, made)
  metadata.check_rest()
  return configs.freeze(unflatten_dict(made, sep="."), ModelConfig, "model.")


def _refuse(metadata: Metadata, shapes):
  """Refuses what a file says and this project would have to ignore."""
  if metadata.get("expert_count", 0):
    raise UserError(f"this GGUF file's {metadata.name} is a mixture of experts, which is not known")
  if "rope_factors_long.weight" in shapes:
    raise UserError("this GGUF file scales its rotary positions by longrope, which is not known")
  if "token_embd.weight" not in shapes:
    raise UserError("this GGUF file holds no tensor 'token_embd.weight': it is not a whole model")


def _same_heads(metadata: Metadata, h: int):
  """Refuses heads whose sizes differ between keys and values, or between layers."""
  rotary = metadata.count("rope.dimension_count", h)
  for key, usual in (
    ("attention.value_length", h),
    ("attention.key_length_swa", h),
    ("attention.value_length_swa", h),
    ("rope.dimension_count_swa", rotary),
  ):
    if metadata.count(key, usual) != usual:
      raise UserError(
        f"GGUF key '{metadata.name}.{key}' is {metadata.get(key)} and not {usual} as in the other "
        "heads, which is not known"
      )


def _seen(shapes, head_dim: int) -> dict:
  """What the tensors of the first layer's attention say."""
  bias = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
  normed = shapes.get("blk.0.attn_q_norm.weight")
  return {
    "attention.qk_norm": "none" if not normed else "head" if normed == (head_dim,) else "all",
    "attention.bias": "all" if "blk.0.attn_output.bias" in shapes else "qkv" if bias else "none",
  }


def _norm(metadata: Metadata, shapes, made: dict) -> dict:
  before, after, post = (
    f"blk.0.{name}.weight" in shapes
    for name in ("attn_norm", "post_attention_norm", "attn_output_norm")
  )
  inside = "pre" if not after else "sandwich" if before else "output"
  layer = made.get("norm.kind") == "layer"
  key = f"attention.layer_norm{'' if layer else '_rms'}_epsilon"
  eps = metadata.get(key, 0.0)
  if eps <= 0:
    raise UserError(f"GGUF key '{metadata.name}.{key}' is missing or not positive")
  bias = layer and any(name.endswith("norm.bias") for name in shapes)
  return {"norm.place": "post" if post else inside, "norm.eps": eps, "norm.bias": bias}


def _window(metadata: Metadata, made: dict):
  """Settles which layers have a window, and the base of their rotary positions."""
  pattern = made.pop("attention.pattern", None)
  local = made.pop("position.local_theta", 0.0)
  given, layers = metadata.get("attention.sliding_window_pattern"), made["layers"]
  if not made["attention.window"]:
    return
  if pattern is None:
    raise UserError(f"a sliding window in GGUF architecture {metadata.name} is not known")
  if isinstance(given, list):  # a flag for each layer
    if len(given) < layers:
      raise UserError(f"GGUF's sliding_window_pattern has {len(given)} flags for {layers} layers")
    pattern = shortest_pattern(["window" if each else "full" for each in given[:layers]])
  elif given is not None:  # the last of so many layers is full; 0: none is
    period = metadata.count("attention.sliding_window_pattern")
    pattern = ("window",) * (period - 1) + ("full",) if period else ("window",)
  if "window" not in pattern:
    made["attention.window"] = 0
    return
  made["attention.pattern"] = pattern
  base = metadata.get("rope.freq_base_swa")
  if base and local == 0 and "position.scaling" in made:
    raise UserError(f"{metadata.name} with scaled positions and 'rope.freq_base_swa' is not known")
  made["position.local_theta"] = base or (made["position.theta"] if local is None else local)


def _positions(metadata: Metadata, shapes, head_dim: int) -> dict:
  """Positions, and how many there are: those that a stretch adds are counted."""
  table = shapes.get("position_embd.weight")
  if table:
    return {"position.kind": "learned", "context": table[0]}
  context = metadata.count("context_length")
  made = {
    "context": context,
    "position.theta": metadata.get("rope.freq_base", 10_000.0),
    "position.fraction": metadata.count("rope.dimension_count", head_dim) / head_dim,
  }
  kind = metadata.get("rope.scaling.type", "linear")
  if kind not in ("none", "linear", "yarn"):
    raise UserError(f"GGUF rope scaling {kind!r} is not one of linear, none, yarn")
  factor = metadata.get("rope.scale_linear", 0.0)  # the older name
  factor = metadata.get("rope.scaling.factor", factor) or 1.0
  share = metadata.get("rope.scaling.attn_factor", 1.0)
  original = metadata.count("rope.scaling.original_context_length", 0)
  scaled = kind != "none" and factor != 1
  if share != 1 and not (scaled and kind == "yarn"):
    raise UserError(f"GGUF key 'rope.scaling.attn_factor' {share} is known with yarn alone")
  if not scaled:
    return made
  if factor < 1:
    raise UserError(f"GGUF rope scaling factor {factor} is below 1")
  made |= {"position.scaling": kind, "position.factor": factor}
  if original or not metadata.get("rope.scaling.finetuned", False):
    made["context"] = max(context, int((original or context) * factor))
  if kind == "linear":
    return made
  return made | {
    "position.original_context": original or context,
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
