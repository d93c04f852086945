"""Ways in which `config.json` files give rotary positions; the angles transformers makes of them.

`make test-oracle` works out `ropes.json` anew and compares; `make test` reads it.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "ropes.json"
SHORT, LONG = [1.0, 1.25, 1.5, 2.0], [1.5, 2.5, 4.0, 8.0]
ORIGINAL = "original_max_position_embeddings"
_SIZES = {
  "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8,
  "vocab_size": 37, "num_key_value_heads": 4, "max_position_embeddings": 64,
}


def _yarn(**more):
  return {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16, **more}}


def _longrope(**more):
  return {"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, **more}}


def _odd(width, share):  # a head of this width, of which this share turns
  sizes = {key: value for key, value in _SIZES.items() if "key_value" not in key}
  return sizes | {"hidden_size": 4 * width, "rotary_pct": share}


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name → (model_type, config.json, length of the text, the context that we allow)
ROPES = {
  "both_blocks": (
    "llama",
    {
      "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
      "rope_scaling": {"rope_type": "linear", "factor": 4.0},
      "rope_theta": 100_000,
    },
    40, 256,
  ),
  "both_blocks_without_base": (
    "mixtral",
    {"rope_parameters": {"rope_theta": 50.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    40, 128,
  ),
  "linear": ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.5}}, 40, 160),
  "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64, 64),
  "llama3": ("llama", {"rope_scaling": {**_LLAMA3, ORIGINAL: 16}}, 40, 64),
  "llama3_context_outside": ("llama", {"rope_scaling": _LLAMA3, ORIGINAL: 24}, 40, 64),
  "yarn_finetuned": ("llama", _yarn(finetuned=True), 40, 64),
  "yarn_attn_factor": ("qwen3", _yarn(attn_factor=0.9) | {"head_dim": 16}, 40, 64),
  "yarn_attention_factor": ("llama", _yarn(attention_factor=0.9), 40, 64),
  "yarn_mscale": ("llama", _yarn(mscale=0.7, mscale_all_dim=1.0), 40, 64),
  "yarn_one_mscale": ("llama", _yarn(mscale=0.7), 40, 64),
  "yarn_betas": ("llama", _yarn(beta_fast=3, beta_slow=None), 40, 64),
  "yarn_original_missing": ("llama", _yarn(**{ORIGINAL: None, "beta_fast": 8.0}), 40, 256),
  "yarn_original_outside": ("llama", _yarn() | {ORIGINAL: 32}, 40, 128),
  "yarn_factor_null": ("llama", _yarn(factor=None), 40, 64),
  "longrope_short": ("llama", _longrope(**{ORIGINAL: 16, "factor": 4.0}), 16, 64),
  "longrope_long": ("llama", _longrope(**{ORIGINAL: 16, "factor": 2.0}), 17, 64),
  "longrope_phi3": ("phi3", _longrope() | {ORIGINAL: 16}, 17, 64),
  "longrope_attention_factor": ("phi3", _longrope(attention_factor=1.5) | {ORIGINAL: 16}, 17, 64),
  "longrope_su": (
    "phi3",
    {
      "rope_scaling": {
        "type": "su", "short_factor": SHORT[:3], "long_factor": LONG[:3],
        ORIGINAL: 16,  # the one outside, or its default of 4096, comes first
      }
    }
    | {"partial_rotary_factor": 0.75, "max_position_embeddings": 8192},
    17, 8192,
  ),
  "gemma3_full": (
    "gemma3_text",
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 8, "num_hidden_layers": 6},
    40, 64,
  ),
  "neox_3_of_12": ("gpt_neox", _odd(12, 0.25), 40, 64),
  "neox_5_of_7": ("gpt_neox", _odd(7, 0.8), 40, 64),
  "neox_5_of_20_linear": (
    "gpt_neox", _odd(20, 0.25) | {"rope_scaling": {"type": "linear", "factor": 2.0}}, 40, 128,
  ),
  "phi3_3_of_8": ("phi3", {"partial_rotary_factor": 0.4}, 40, 64),
}


def config_of(name: str) -> dict:
  """The `config.json` of a case; its keys that are None here are left out of the block."""
  kind, values, _, _ = ROPES[name]
  block = values.get("rope_scaling", {})
  block = {key: value for key, value in block.items() if value is not None or key != ORIGINAL}
  sizes = {} if kind == "gpt_neox" else _SIZES
  return {"model_type": kind, **sizes, **values} | ({"rope_scaling": block} if block else {})


def kept() -> dict:
  """What transformers said: name → (cosines, sines) of the last position, one a channel pair."""
  said = json.loads(FILE.read_text())
  return {name: np.array(each, np.float32) for name, each in said.items()}
