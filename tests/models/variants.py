"""The model configs that are compared with the reference, inputs and weights for them.

Every value that `ModelConfig` can take stands in at least one row (`test_coverage.py` sees to it),
each row changes several at a time, and all are as small as will do.
"""

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np

from llmjax.core import tree
from llmjax.core.config import flat, freeze
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig

T, S, V = 12, 10, 40  # target positions, source positions, tokens

# What all start from; a row gives what differs, by dotted key.
BASE = {
  "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocab_size": V,
  "max_seq_len": 16, "dtype": "float32",
}
IMAGE = {
  "vision.image_size": 4, "vision.patch": 2, "vision.channels": 2, "vision.image_token": 39,
  "vision.layers": 2, "vision.width": 16, "vision.heads": 2, "vision.mlp_width": 24,
}

ROWS = {
  "llama": {},
  "untied": {
    "tie_embeddings": False, "head_dim": 6, "kv_heads": 0, "layers": 3, "scan": False,
    "position.theta": 100.0, "attention.mask": "causal", "position.scaling": "longrope",
    "position.factor": 4.0, "position.original_context": 6,
    "position.divisors": (1.0, 1.2, 1.5, 1.3, 2.0, 3.0),
  },
  "gpt2": {
    "position.kind": "learned", "norm.kind": "layer", "norm.bias": True, "mlp_bias": True,
    "attention.bias": "all", "activation": "gelu_tanh", "norm.eps": 1e-3, "remat": "full",
  },
  "gptj": {
    "block": "parallel_shared", "position.layout": "interleaved", "position.fraction": 0.5,
    "norm.kind": "layer", "activation": "gelu", "embed.head_bias": True, "tie_embeddings": False,
    "remat": "dots",
  },
  "neox": {
    "block": "parallel", "position.fraction": 0.25, "activation": "relu", "attention.bias": "qkv",
    "position.scaling": "linear", "position.factor": 4.0, "remat": "save_projections",
  },
  "gemma2": {
    "layers": 3, "attention.pattern": ("window", "full"), "attention.window": 4,
    "attention.softcap": 2.0, "attention.scale": 0.5, "embed.logit_softcap": 3.0,
    "embed.scale": 32**0.5, "norm.place": "sandwich", "activation": "geglu_tanh",
    "attention.qk_norm": "head", "position.local_theta": 50.0,
  },
  "gptoss": {
    "attention.sinks": True, "attention.pattern": ("full", "window"), "attention.window": 3,
    "position.scaling": "yarn", "position.factor": 4.0, "position.original_context": 8,
    "position.theta": 200.0, "position.beta_fast": 3.0, "position.beta_slow": 0.1,
    "attention.bias": "all", "layers": 3, "remat": "offload",
  },
  "yarn_factor": {
    "position.scaling": "yarn", "position.factor": 2.0, "position.original_context": 64,
    "position.attention_factor": 1.3, "position.local_theta": 30.0, "attention.window": 5,
    "attention.pattern": ("window", "full"),
  },
  "llama3": {
    "position.scaling": "llama3", "position.factor": 8.0, "position.original_context": 60,
    "position.low_freq_factor": 2.0, "position.high_freq_factor": 6.0, "embed.logit_scale": 0.5,
  },
  "ntk": {"position.scaling": "ntk", "position.factor": 3.0, "activation": "reglu"},
  "olmo2": {
    "norm.place": "output", "attention.qk_norm": "all", "activation": "silu",
    "tie_embeddings": False, "layers": 3,
  },
  "post": {
    "norm.place": "post", "norm.kind": "layer", "position.kind": "sinusoidal",
    "position.theta": 500.0, "activation": "relu2", "mlp_bias": True,
  },
  "halves": {"position.kind": "sinusoidal_halves", "position.theta": 500.0, "activation": "silu"},
  "alibi": {
    "position.kind": "alibi", "heads": 6, "head_dim": 4, "embed.norm": True, "norm.kind": "layer",
    "activation": "geglu", "mlp_bias": True,
  },
  "sparse": {
    "attention.pattern": ("sparse",), "attention.sparse_block": 2, "attention.sparse_local": 1,
    "attention.sparse_global": 0, "attention.sparse_stride": 3, "position.kind": "none",
    "attention.kernel": "direct",
  },
  "prefix": {
    "attention.mask": "prefix", "position.kind": "relative", "position.buckets": 8,
    "position.max_distance": 10, "attention.pattern": ("full", "window", "sparse"),
    "attention.window": 2, "attention.sparse_block": 4, "layers": 4, "activation": "quick_gelu",
  },
  "strips": {
    "attention.kernel": "blockwise", "attention.block": 16, "max_seq_len": 40,
    "attention.window": 9, "attention.pattern": ("window",), "layers": 1, "norm.final": False,
  },
  "mla": {
    "kv_heads": 0, "attention.latent.kv_rank": 12, "attention.latent.query_rank": 10,
    "attention.latent.rope_dim": 6, "attention.latent.nope_dim": 5,
    "attention.latent.value_dim": 7, "position.layout": "interleaved", "position.scaling": "yarn",
    "position.factor": 4.0, "position.original_context": 8, "position.attention_factor": 1.2,
    "attention.scale": 0.4, "layers": 3,
  },
  "mla_strips": {
    "kv_heads": 0, "attention.latent.kv_rank": 8, "attention.latent.rope_dim": 4,
    "attention.latent.nope_dim": 4, "attention.latent.value_dim": 5, "attention.window": 9,
    "attention.kernel": "blockwise", "attention.block": 16, "max_seq_len": 40,
    "attention.pattern": ("window",), "layers": 1,
  },
  "both_ways": {"attention.mask": "bidirectional", "embed.types": 2, "block": "parallel",
                "norm.place": "sandwich"},
  "bf16": {"dtype": "bfloat16", "attention.sinks": True},
  "bert": {
    "kind": "encoder", "position.kind": "learned", "norm.kind": "layer", "norm.bias": True,
    "norm.place": "post", "embed.norm": True, "embed.types": 2, "embed.head_bias": True,
    "activation": "gelu", "mlp_bias": True, "attention.bias": "all", "norm.eps": 1e-6,
  },
  "modern_bert": {
    "kind": "encoder", "attention.pattern": ("full", "window", "sparse"), "attention.window": 3,
    "attention.sparse_block": 3, "attention.sparse_global": 1, "layers": 4, "activation": "geglu",
    "attention.qk_norm": "head", "tie_embeddings": False,
  },
  "t5": {
    "kind": "encoder_decoder", "position.kind": "relative", "position.buckets": 8,
    "position.max_distance": 9, "encoder_layers": 3, "activation": "relu", "attention.scale": 1.0,
    "embed.logit_scale": 32**-0.5,
  },
  "bart": {
    "kind": "encoder_decoder", "norm.kind": "layer", "norm.bias": True, "norm.place": "post",
    "position.kind": "learned", "attention.bias": "all", "mlp_bias": True, "embed.norm": True,
    "activation": "gelu", "embed.scale": 2.0,
  },
  "open_nmt": {
    "kind": "encoder_decoder", "norm.kind": "layer", "norm.bias": True, "attention.bias": "all",
    "position.kind": "sinusoidal_t2t", "position.first": 1, "source_vocab_size": V + 9,
    "mlp_bias": True, "activation": "silu", "embed.scale": 32**0.5, "embed.head_bias": True,
  },
  "rope_t5": {
    "kind": "encoder_decoder", "norm.place": "sandwich", "attention.qk_norm": "all",
    "attention.sinks": True, "attention.softcap": 3.0, "attention.pattern": ("window", "full"),
    "attention.window": 4, "layers": 3, "encoder_layers": 1, "tie_embeddings": False,
  },
  "vit": {
    "kind": "vision", "position.kind": "learned", "norm.kind": "layer", "norm.bias": True,
    "mlp_bias": True, "attention.bias": "all", "activation": "gelu", "vision.image_size": 6,
    "vision.patch": 2, "kv_heads": 0,
  },
  "vit_mean": {
    "kind": "vision", "position.kind": "learned", "vision.image_size": 4, "vision.patch": 2,
    "vision.class_token": False, "vision.patch_bias": False, "embed.norm": True, "remat": "dots",
  },
  "llava": {**IMAGE, "attention.bias": "qkv", "scan": False},
  "llava_plain": {
    **IMAGE, "vision.class_token": False, "vision.patch_bias": False, "vision.input_norm": False,
    "vision.activation": "gelu", "vision.eps": 1e-2, "position.kind": "learned",
    "vision.image_token": 38,
  },
  "mixtral": {"moe.experts": 4, "attention.window": 5, "attention.pattern": ("window",)},
  "deepseek": {
    "moe.experts": 8, "moe.top_k": 3, "moe.width": 16, "moe.shared": 1, "moe.first_k_dense": 1,
    "moe.router": "sigmoid", "moe.bias": True, "moe.groups": 4, "moe.top_groups": 2,
    "moe.scale": 2.5, "layers": 4, "attention.pattern": ("full", "window"), "attention.window": 4,
    "remat": "full",
  },
  "switch": {
    "moe.experts": 4, "moe.top_k": 1, "moe.renormalize": False, "moe.capacity": 0.8,
    "activation": "relu", "norm.place": "sandwich", "scan": False, "moe.first_k_dense": 1,
  },
  "vmoe": {
    "moe.experts": 4, "moe.capacity": 0.7, "moe.drop": "lightest", "moe.noisy": True,
    "kind": "encoder", "activation": "gelu", "norm.place": "post",
  },
  "expert_choice": {
    "moe.experts": 4, "moe.router": "expert_choice", "moe.shared": 2, "moe.width": 12,
    "block": "parallel", "remat": "save_projections",
  },
  "hash": {"moe.experts": 5, "moe.router": "hash", "block": "parallel_shared", "remat": "dots"},
  # What a forward pass in float64 cannot have: the reference is compared without dropping.
  "dropout": {"dropout": 0.3},
}


def make_config(**keys) -> ModelConfig:
  """A config from dotted keys over `BASE`."""
  values = dataclasses.asdict(ModelConfig())
  for key, value in {**BASE, **keys}.items():
    *sections, name = key.split(".")
    place = values
    for section in sections:
      place = place[section]
    assert name in place, key
    place[name] = value
  return freeze(values, ModelConfig)


VARIANTS = {name: make_config(**row) for name, row in ROWS.items()}
TEXT = [name for name, config in VARIANTS.items() if config.kind != "vision"]
DECODERS = [name for name, config in VARIANTS.items() if config.kind == "decoder"]


def weights_of(config: ModelConfig):
  """A model whose every weight is away from its start, from numpy alone: nothing is compiled."""

  def make(path, leaf):
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    noise = rng.normal(size=leaf.shape)
    name = path.rsplit("/", 1)[-1]
    if name.startswith("scale"):
      made = 1 + 0.2 * noise
    elif "bias" in name or name.startswith(("sinks", "relative")):
      made = 0.5 * noise
    else:
      made = (0.4 if path.startswith("embed/") else 0.2) * noise
    return jnp.asarray(made, jnp.float32)

  return tree.map_with_path(make, abstract(config))


def values_of(model) -> dict:
  """Its weights by path in float64, as the reference wants them."""
  return {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model).items()}


def reference_config(config: ModelConfig) -> dict:
  """Its values by dotted key, as the reference wants them."""
  return flat(config)


def inputs(config: ModelConfig, seed: int = 0) -> dict:
  """Two rows: one of three packed documents and padding, one whole; by the reference's names."""
  rng = np.random.default_rng(seed)
  t = 36 if config.max_seq_len >= 40 else T
  if config.kind == "vision":
    shape = (2, config.vision.patches, config.vision.patch_numbers)
    return {"patches": rng.normal(size=shape).astype(np.float32)}
  lengths = [t // 2 - 1, t // 2 - 1, 1]
  made = {
    "tokens": rng.integers(0, V - 2, (2, t)).astype(np.int32),
    "segments": np.array([_numbers(lengths, t), [1] * t], np.int32),
    "positions": np.array([_places(lengths, t), [*range(t)]], np.int32),
  }
  if config.attention.mask == "prefix":
    made["prefix"] = made["positions"] < np.array([[2], [5]])
  if config.embed.types:
    made["types"] = rng.integers(0, config.embed.types, (2, t)).astype(np.int32)
  if config.kind == "encoder_decoder":
    lengths = [3, 4, 2]
    ids = config.source_vocab_size or V
    made["source"] = rng.integers(0, ids, (2, S)).astype(np.int32)
    made["source_segments"] = np.array([_numbers(lengths, S), [1] * (S - 2) + [0] * 2], np.int32)
    made["source_positions"] = np.array([_places(lengths, S), [*range(S)]], np.int32)
  if config.vision.image_size:
    vision = config.vision
    made["tokens"][0, 1:5] = vision.image_token  # one image; a second one follows, in parts
    made["tokens"][0, [6, 7, 8, 9]] = vision.image_token
    made["tokens"][1, [0, 2, 3, 4, 7, 8, 10, 11]] = vision.image_token
    shape = (2, 2 * vision.patches, vision.patch_numbers)
    made["patches"] = rng.normal(size=shape).astype(np.float32)
  return made


def _numbers(lengths, t):
  """Document numbers from 1 of a row, 0 where it is padding."""
  numbers = [i + 1 for i, length in enumerate(lengths) for _ in range(length)]
  return numbers + [0] * (t - len(numbers))


def _places(lengths, t):
  places = [place for length in lengths for place in range(length)]
  return places + [0] * (t - len(places))


_FIELDS = {
  "tokens": "tokens_bt", "segments": "segments_bt", "positions": "positions_bt",
  "prefix": "prefix_bt", "types": "types_bt", "source": "source_bs",
  "source_segments": "source_segments_bs", "source_positions": "source_positions_bs",
  "patches": "patches_bsi",
}


def batch_of(given: dict, **more) -> Batch:
  """The library's batch of such inputs."""
  return Batch(**{_FIELDS[name]: jnp.asarray(array) for name, array in given.items()}, **more)


def scored_places(config: ModelConfig, given: dict):
  """(targets, weights): some of the predictions count, none at padding."""
  rng = np.random.default_rng(1)
  shape = (2, 1) if config.kind == "vision" else given["tokens"].shape
  weights = (rng.random(shape) < 0.7).astype(np.float32) * rng.uniform(0.5, 1, shape)
  weights = weights * (given.get("segments", 1) > np.zeros(shape))
  weights[:, 0] = 1
  return rng.integers(0, config.vocab_size, shape).astype(np.int32), weights.astype(np.float32)
