"""One way of writing an architecture, so that two configs of the same computation are equal."""

import dataclasses
import math
from collections.abc import Sequence

from llmjax.models.config import ModelConfig, VisionConfig
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.moe import MoeConfig
from llmjax.nn.position import SINUSOIDS, PositionConfig


def canonical(config: ModelConfig) -> ModelConfig:
  """Fills sizes in and sets what changes nothing to its default. Rotary positions come out in half
  layout, but for latent attention, whose families say which; `hf.half_layout` permutes weights."""
  dims, vision = config.dims, config.kind == "vision"
  encoder_layers = config.encoder_layers or config.layers
  moe = _canonical_moe(config)
  return dataclasses.replace(
    config,
    kv_heads=dims["k"],
    head_dim=dims["h"],
    encoder_layers=encoder_layers if config.kind == "encoder_decoder" else 0,
    attention=_canonical_attention(config),
    position=_canonical_position(config),
    norm=dataclasses.replace(config.norm, final=config.norm.final or config.norm.place == "post"),
    moe=moe,
    mlp_width=config.mlp_width if moe.first_k_dense or not moe.experts else moe.width,
    vision=config.vision if config.vision.image_size else VisionConfig(),
    max_seq_len=1 if vision else _canonical_context(config),
    tie_embeddings=vision or config.tie_embeddings,
  )


def _canonical_attention(config: ModelConfig) -> AttentionConfig:
  attention, h = config.attention, config.dims["h"]
  layers = config.layer_kinds
  usual = config.kind == "encoder_decoder" or config.causal == (config.kind == "decoder")
  unread = ("window", "sparse_block", "sparse_local", "sparse_global", "sparse_stride")
  unread = [key for key in unread if key.partition("_")[0] not in layers]
  return dataclasses.replace(
    attention,
    pattern=shortest_pattern(layers),
    mask="auto" if usual else attention.mask,
    scale=0.0 if attention.scale == h**-0.5 else attention.scale,
    **{key: getattr(AttentionConfig(), key) for key in unread},
  )


def _canonical_moe(config: ModelConfig) -> MoeConfig:
  moe = config.moe
  if not moe.experts:
    return moe
  return dataclasses.replace(
    moe,
    width=moe.width or config.mlp_width,
    top_groups=1 if moe.groups == 1 else moe.top_groups,
    drop=moe.drop if moe.capacity else MoeConfig().drop,
  )


# Kind of positions, or scaling of rotary ones → the fields of `PositionConfig` that it reads.
READ = {
  "rope": ("theta", "local_theta", "fraction", "scaling"),
  **dict.fromkeys(SINUSOIDS, ("theta", "first")),
  "relative": ("buckets", "max_distance"),
  "linear": ("factor",),
  "ntk": ("factor",),
  "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "attention_factor"),
  "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
  "longrope": ("factor", "original_context", "attention_factor", "divisors"),
}


def _canonical_position(config: ModelConfig) -> PositionConfig:
  position = config.position
  read = READ.get(position.kind, ())
  if position.kind == "rope":
    read += READ.get(position.scaling, ())
  if config.attention.latent.kv_rank:
    read += ("layout",)
  position = PositionConfig(kind=position.kind, **{key: getattr(position, key) for key in read})
  windows = "window" in config.attention.pattern[: config.layers]
  if not windows or (position.local_theta == position.theta and position.scaling == "none"):
    position = dataclasses.replace(position, local_theta=0.0)
  if position.scaling == "ntk":  # the same angles as a larger base
    r = position.rotary_width(config.rotary_head)
    theta = position.theta * position.factor ** (r / (r - 2))
    position = dataclasses.replace(position, theta=theta, scaling="none", factor=1.0)
  return position


def _canonical_context(config: ModelConfig) -> int:
  """The least context that families can express: with linear scaling they give the one before the
  stretch, and yarn's holds all that it is stretched to."""
  position, context = config.position, config.max_seq_len
  scaling = position.scaling if position.kind == "rope" else "none"
  if scaling == "linear":
    return int(math.ceil(context / position.factor) * position.factor)
  if scaling == "yarn":
    return max(context, int(position.factor * position.original_context))
  return context


def shortest_pattern(layers: Sequence[str]) -> tuple:
  """Finds the shortest pattern whose repetition begins with these kinds of layers."""
  for period in range(1, len(layers) + 1):
    if all(kind == layers[i % period] for i, kind in enumerate(layers)):
      return tuple(layers[:period])
  return ("full",)
