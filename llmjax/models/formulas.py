"""What follows from a config by arithmetic: FLOPs, bytes of the key/value cache."""

import numpy as np

from llmjax.models.config import ModelConfig
from llmjax.nn.mlp import GATED


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
  """Counts the multiply-adds (×2) of one token's forward pass in a row of `length`.

  Matrix products and attention's two products only, over the keys that a query may see on average:
  (length + 1) / 2 in a causal row. Of experts, those that a token uses; of latent attention, keys
  and values as training makes them. Training costs three times as much. Of an encoder_decoder, the
  decoder reads `length` tokens and the encoder as many, and both are counted for one token.
  """
  d, n, k, h, f, v, l = (config.dims[letter] for letter in "dnkhfvl")
  moe = config.moe
  inputs = 2 if config.activation in GATED else 1
  layer = 2 * _projections(config)
  dense = moe.first_k_dense if moe.experts else l
  active = (moe.top_k + moe.shared) * (moe.width or f)
  thinking = dense * 2 * (inputs + 1) * d * f
  thinking += (l - dense) * 2 * d * ((inputs + 1) * active + moe.experts * (moe.router != "hash"))
  total = l * layer + thinking + scores_flops_per_token(config, length) + 2 * d * v
  if config.kind == "encoder":
    total += 2 * d * d
  if config.kind == "encoder_decoder":
    encoder_layers = config.encoder_layers or l
    scores = 4 * n * h
    total += encoder_layers * (layer + 2 * (inputs + 1) * d * f + scores * length)
    total += l * (2 * d * h * (2 * n + 2 * k) + scores * length)  # cross attention
  return total


def scores_flops_per_token(config: ModelConfig, length: int, block: int = 1) -> float:
  """Counts attention's two products of one token in all layers, over the keys that it sees.

  Args:
    config: the architecture.
    length: positions of a row, one document.
    block: positions of a side of a kernel's blocks, which it computes whole; 1 counts pairs.
  """
  blocks = -(-length // block)
  seen = sum(
    _keys_seen(config, kind, length) if kind == "sparse"
    else block * _keys_seen(config, kind, blocks, block)
    for kind in _kinds(config)
  )
  h = config.dims["h"]
  return 2 * config.heads * (h + (config.attention.latent.value_dim or h)) * seen


def _projections(config: ModelConfig) -> int:
  """Weights of attention's products with the stream and with latents."""
  d, n, k, h = (config.dims[letter] for letter in "dnkh")
  latent = config.attention.latent
  if not latent.kv_rank:
    return 2 * d * h * (n + k)
  r, low, value = latent.kv_rank, latent.query_rank, latent.value_dim
  queries = low * (d + n * h) if low else d * n * h
  return queries + d * (r + latent.rope_dim) + r * n * (latent.nope_dim + value) + n * value * d


def seen_share(config: ModelConfig, length: int, block: int = 1) -> float:
  """Share of a row's pairs of query and key that lie in blocks which a mask touches.

  The mean over layers, block-sparse ones left out: their kernel is another.

  Args:
    config: architecture, with some layer that is not block-sparse.
    length: positions of a row, one document.
    block: positions of a square block's side; 1 counts the pairs themselves.
  """
  kinds = [kind for kind in _kinds(config) if kind != "sparse"]
  blocks = -(-length // block)
  return sum(_keys_seen(config, kind, blocks, block) for kind in kinds) / (blocks * len(kinds))


def filled_share(config: ModelConfig, ways: int) -> float:
  """Share of the room for experts' rows that even load fills: k / (ways · min(k, experts / ways)).

  A device may be sent all tokens of all devices that share the experts, and has room for them.

  Args:
    config: architecture with experts, each taking any number of tokens.
    ways: devices that experts are cut over.
  """
  moe = config.moe
  return moe.top_k / (ways * min(moe.top_k, moe.experts // ways))


def _kinds(config: ModelConfig) -> list[str]:
  pattern = config.attention.pattern
  return [pattern[i % len(pattern)] for i in range(config.layers)]


def _keys_seen(config: ModelConfig, layer: str, length: int, block: int = 1) -> float:
  """Keys an average query of one document of `length` sees in a kind of layer.

  With `block` both are blocks of so many positions, seen if any of theirs is.
  """
  if layer == "full":
    return (length + 1) / 2 if config.causal else length
  rule = config.attention.rule(layer, config.causal)
  if layer == "window":
    reach = min((rule.window - 2) // block + 2, length)
    before = (reach - 1) * (length - reach / 2) / length  # mean over places p of min(p, reach - 1)
    return 1 + before * (1 if config.causal else 2)
  size = rule.sparse_block
  places, blocks = np.arange(length), np.arange(-(-length // size))
  apart = abs(blocks[:, None] - blocks)
  near = (apart < rule.sparse_local) | (np.minimum.outer(blocks, blocks) < rule.sparse_global)
  if rule.sparse_stride:
    near |= apart % rule.sparse_stride == 0
  end = places[:, None] + 1 if config.causal else length
  keys = np.clip(end - size * blocks, 0, np.minimum(size, length - size * blocks))  # of each block
  return float((keys * near[places // size]).sum() / length)


def cache_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
  """Counts the key/value cache's bytes for each position of a row: 2 · l · k · h · bytes.

  Latent attention keeps l · (kv_rank + rope_dim) numbers.

  LLaMA-7B in fp16: 2 · 32 · 32 · 128 · 2 = 524,288, a GiB at 2,048 positions.
  """
  l, k, h = (config.dims[letter] for letter in "lkh")
  latent = config.attention.latent
  kept = latent.kv_rank + latent.rope_dim if latent.kv_rank else 2 * k * h
  return l * kept * dtype_bytes
