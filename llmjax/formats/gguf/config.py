"""GGUF metadata → `ModelConfig`: norms, biases and the head follow from which tensors there are,
the rest from keys; an architecture's name decides what its files leave unsaid."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

from llmjax.core import config as configs
from llmjax.core.errors import UserError
from llmjax.formats.gguf.keys import Metadata
from llmjax.formats.gguf.rope import FREQUENCIES, positions, with_divisors
from llmjax.formats.hf.canonical import shortest_pattern
from llmjax.models.config import ModelConfig

# What files of an architecture leave unsaid, by our keys; numbers are llama.cpp's where a key is
# missing. The pattern and the base of rotary positions hold where there is a window; a base of None
# is that of the other layers, unscaled.
ARCHITECTURES = {
  "bert": {"kind": "encoder", "activation": "gelu", "embed.head_bias": True, "norm.kind": "layer"},
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
  "olmo2": {"attention.pattern": ("window",) * 3 + ("full",), "position.local_theta": None},
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


def config_of(
  values: Mapping, shapes: Mapping[str, tuple], factors: Mapping[str, np.ndarray]
) -> ModelConfig:
  """Reads a file's architecture; arithmetic is fp32.

  Args:
    shapes: tensor name → shape, the dimension that is multiplied last.
    factors: those of `ROPE_TENSORS` that the file has.
  Raises:
    UserError: an architecture, or a variant of one, that is not known here.
  Source: `load_hparams` of llama.cpp's src/llama-model.cpp and src/models.
  """
  metadata = Metadata(values, ARCHITECTURES)
  if metadata.get("expert_count", 0):
    raise UserError(f"this GGUF file's {metadata.name} is a mixture of experts, which is not known")
  if "token_embd.weight" not in shapes:
    raise UserError("this GGUF file holds no tensor 'token_embd.weight': it is not a whole model")
  fields = {"dtype": "float32"} | ARCHITECTURES[metadata.name]
  fields |= {field: metadata.count(key) for field, key in _COUNTS.items()}
  width, heads = fields["width"], fields["heads"]
  h = metadata.count("attention.key_length", 0) or width // max(heads, 1)
  _same_heads(metadata, h)
  fields |= {
    "kv_heads": metadata.count("attention.head_count_kv", heads),
    "head_dim": h,
    "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    "vocab_size": shapes["token_embd.weight"][0],
    "tie_embeddings": "output.weight" not in shapes,
    "embed.types": shapes.get("token_types.weight", (0,))[0],
    "embed.norm": "token_embd_norm.weight" in shapes,
  }
  if _LARGE.get(metadata.name) == fields["layers"]:
    fields["attention.scale"] = (width // heads) ** -0.5
  fields |= {field: metadata.get(key, fields.get(field, 0)) for field, key in _NUMBERS.items()}
  usual = math.sqrt(width) if metadata.name.startswith("gemma") else 1.0
  fields["embed.scale"] = metadata.get("embedding_scale", 0.0) or usual
  causal = fields.get("kind") != "encoder"
  if bool(metadata.get("attention.causal", causal)) != causal:
    fields["attention.mask"] = "bidirectional" if causal else "causal"
  fields |= positions(metadata, shapes, factors, h)
  bias = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
  normed = shapes.get("blk.0.attn_q_norm.weight")
  fields |= {
    "attention.qk_norm": "none" if not normed else "head" if normed == (h,) else "all",
    "attention.bias": "all" if "blk.0.attn_output.bias" in shapes else "qkv" if bias else "none",
  }
  fields |= _norm(metadata, shapes, fields)
  _window(metadata, fields)
  metadata.check_rest()
  config = configs.freeze(unflatten_dict(fields, sep="."), ModelConfig, "model.")
  if FREQUENCIES not in factors:
    return config
  position = with_divisors(config.position, h, factors[FREQUENCIES].astype(np.float64))
  return dataclasses.replace(config, position=position)


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


def _norm(metadata: Metadata, shapes, fields: dict) -> dict:
  before, after, post = (
    f"blk.0.{name}.weight" in shapes
    for name in ("attn_norm", "post_attention_norm", "attn_output_norm")
  )
  inside = "pre" if not after else "sandwich" if before else "output"
  layer = fields.get("norm.kind") == "layer"
  key = f"attention.layer_norm{'' if layer else '_rms'}_epsilon"
  eps = metadata.get(key, 0.0)
  if eps <= 0:
    raise UserError(f"GGUF key '{metadata.name}.{key}' is missing or not positive")
  bias = layer and any(name.endswith("norm.bias") for name in shapes)
  return {"norm.place": "post" if post else inside, "norm.eps": eps, "norm.bias": bias}


def _window(metadata: Metadata, fields: dict):
  pattern = fields.pop("attention.pattern", None)
  local = fields.pop("position.local_theta", 0.0)
  given, layers = metadata.get("attention.sliding_window_pattern"), fields["layers"]
  if not fields["attention.window"]:
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
    fields["attention.window"] = 0
    return
  fields["attention.pattern"] = pattern
  base = metadata.get("rope.freq_base_swa")
  if base and local == 0 and "position.scaling" in fields:
    raise UserError(f"{metadata.name} with scaled positions and 'rope.freq_base_swa' is not known")
  fields["position.local_theta"] = base or (fields["position.theta"] if local is None else local)
