"""How many weights a config has, in closed form."""

from llmjax.models.config import ModelConfig
from llmjax.models.vision import tower_config
from llmjax.nn.mlp import GATED


def parameters(config: ModelConfig) -> int:
  """Counts a model's weights in closed form."""
  d, v, l = (config.dims[letter] for letter in "dvl")
  norm = _norm(config)
  if config.kind == "vision":
    return _tower_parameters(config) + v * d + v
  total = v * d * (1 if config.tie_embeddings else 2) + v * config.embed.head_bias
  total += d * config.embed.types + norm * config.embed.norm
  total += d * config.source_vocab_size
  if config.position.kind == "learned":
    total += config.max_seq_len * d
  cross = config.kind == "encoder_decoder"
  total += _stack_parameters(config, l, cross)
  if cross:
    total += _stack_parameters(config, config.encoder_layers or l)
  if config.kind == "encoder":  # before the head, and the pooler
    total += 2 * (d * d + d) + norm
  if config.kind == "decoder" and config.vision.image_size:
    width = config.vision.width
    total += _tower_parameters(tower_config(config)) + width * d + d + d * d + d
  return total


def _norm(config: ModelConfig) -> int:
  return config.width * (1 + config.norm.bias)


def _stack_parameters(config: ModelConfig, layers: int, cross: bool = False) -> int:
  last = _norm(config) if config.norm.final and config.norm.place != "post" else 0
  table = config.position.buckets * config.heads if config.position.kind == "relative" else 0
  sparse = layers - config.moe.first_k_dense if config.moe.experts else 0
  blocks = sparse * _block_parameters(config, cross, dense=False) if sparse else 0
  return blocks + (layers - sparse) * _block_parameters(config, cross) + last + table


def _tower_parameters(config: ModelConfig) -> int:
  vision, d = config.vision, config.width
  reading = vision.patch_numbers * d + d * (vision.patch_bias + vision.class_token)
  reading += (vision.patches + vision.class_token) * d + _norm(config) * config.embed.norm
  return reading + _stack_parameters(config, config.layers)


def _block_parameters(config: ModelConfig, cross: bool, dense: bool = True) -> int:
  d, n, k, h = (config.dims[letter] for letter in "dnkh")
  attention = _projections(config)
  attention += {"none": 0, "qkv": h * (n + 2 * k), "all": h * (n + 2 * k) + d}[
    config.attention.bias
  ]
  looking = attention if cross else 0  # cross attention has neither sinks nor norms of its own
  attention += {"none": 0, "head": 2 * h, "all": h * (n + k)}[config.attention.qk_norm]
  attention += n * config.attention.sinks
  attention += config.attention.latent.kv_rank + config.attention.latent.query_rank  # norms
  norms = 2 - (config.block == "parallel_shared") + cross
  norms += (2 + cross) * (config.norm.place == "sandwich")
  return attention + looking + _mlp_parameters(config, dense) + norms * _norm(config)


def _mlp_parameters(config: ModelConfig, dense: bool) -> int:
  d, f, moe = config.dims["d"], config.dims["f"], config.moe
  inputs = 2 if config.activation in GATED else 1
  if dense:
    return (inputs + 1) * d * f + (inputs * f + d) * config.mlp_bias
  router = d * ((moe.router != "hash") + moe.noisy) + moe.bias
  return router * moe.experts + (inputs + 1) * d * (moe.width or f) * (moe.experts + moe.shared)


def _projections(config: ModelConfig) -> int:
  """Weights of attention's products with the stream and with latents."""
  d, n, k, h = (config.dims[letter] for letter in "dnkh")
  latent = config.attention.latent
  if not latent.kv_rank:
    return 2 * d * h * (n + k)
  r, low, value = latent.kv_rank, latent.query_rank, latent.value_dim
  queries = low * (d + n * h) if low else d * n * h
  return queries + d * (r + latent.rope_dim) + r * n * (latent.nope_dim + value) + n * value * d
