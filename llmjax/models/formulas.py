"""What follows from a config by arithmetic: parameters, FLOPs, bytes of the key/value cache."""

from llmjax.models.config import ModelConfig
from llmjax.models.vision import tower_config
from llmjax.nn.mlp import GATED


def parameters(config: ModelConfig) -> int:
  """Counts a model's weights in closed form; `build.count_parameters` counts its tree."""
  d, v, l = (config.dims[letter] for letter in "dvl")
  norm = _norm(config)
  if config.kind == "vision":
    return _tower_parameters(config) + v * d + v
  total = v * d * (1 if config.tie_embeddings else 2) + v * config.embed.head_bias
  total += d * config.embed.types + norm * config.embed.norm
  if config.position.kind == "learned":
    total += config.context * d
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
  sparse = layers - config.moe.dense_first if config.moe.experts else 0
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


def _projections(config: ModelConfig) -> int:
  """Weights of attention's products with the stream and with latents."""
  d, n, k, h = (config.dims[letter] for letter in "dnkh")
  latent = config.attention.latent
  if not latent.kv_rank:
    return 2 * d * h * (n + k)
  r, low, value = latent.kv_rank, latent.query_rank, latent.value_dim
  queries = low * (d + n * h) if low else d * n * h
  return queries + d * (r + latent.rope_dim) + r * n * (latent.nope_dim + value) + n * value * d


def _mlp_parameters(config: ModelConfig, dense: bool) -> int:
  d, f, moe = config.dims["d"], config.dims["f"], config.moe
  inputs = 2 if config.activation in GATED else 1
  if dense:
    return (inputs + 1) * d * f + (inputs * f + d) * config.mlp_bias
  router = d * ((moe.router != "hash") + moe.noisy) + moe.bias
  return router * moe.experts + (inputs + 1) * d * (moe.width or f) * (moe.experts + moe.shared)


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
  """Counts the multiply-adds (×2) of one token's forward pass in a row of `length`.

  Matrix products and attention's two products only, over the keys that a query may see on average:
  (length + 1) / 2 in a causal row. Of experts, those that a token uses; of latent attention, keys
  and values as training makes them. Training costs three times as much. Of an encoder_decoder, the
  decoder reads `length` tokens and the encoder as many, and both are counted for one token.
  """
  d, n, k, h, f, v, l = (config.dims[letter] for letter in "dnkhfvl")
  moe, latent = config.moe, config.attention.latent
  inputs = 2 if config.activation in GATED else 1
  layer = 2 * _projections(config)
  dense = moe.dense_first if moe.experts else l
  active = (moe.top_k + moe.shared) * (moe.width or f)
  thinking = dense * 2 * (inputs + 1) * d * f
  thinking += (l - dense) * 2 * d * ((inputs + 1) * active + moe.experts * (moe.router != "hash"))
  scores = 2 * n * (h + (latent.value_dim or h))
  pattern = config.attention.pattern
  seen = sum(_keys_seen(config, pattern[i % len(pattern)], length) for i in range(l))
  total = l * layer + thinking + scores * seen + 2 * d * v
  if config.kind == "encoder":
    total += 2 * d * d
  if config.kind == "encoder_decoder":
    encoder_layers = config.encoder_layers or l
    total += encoder_layers * (layer + 2 * (inputs + 1) * d * f + scores * length)
    total += l * (2 * d * h * (2 * n + 2 * k) + scores * length)  # cross attention
  return total


def _keys_seen(config: ModelConfig, layer: str, length: int) -> float:
  """Keys an average query of one document of `length` sees in a kind of layer."""
  if layer == "full":
    return (length + 1) / 2 if config.causal else length
  rule = config.attention.rule(layer, config.causal)
  if layer == "window":
    reach = min(rule.window, length)
    before = (reach - 1) * (length - reach / 2) / length  # mean over places p of min(p, reach - 1)
    return 1 + before * (1 if config.causal else 2)
  return sum(_sparse_keys(rule, place, length) for place in range(length)) / length


def _sparse_keys(rule, place: int, length: int) -> int:
  own = place // rule.sparse_block
  seen = 0
  for block in range(-(-length // rule.sparse_block)):
    apart = abs(own - block)
    near = apart < rule.sparse_local or min(own, block) < rule.sparse_global
    near |= bool(rule.sparse_stride) and apart % rule.sparse_stride == 0
    first, end = block * rule.sparse_block, min(length, (block + 1) * rule.sparse_block)
    if rule.causal:
      end = min(end, place + 1)
    seen += max(0, end - first) if near else 0
  return seen


def cache_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
  """Counts the key/value cache's bytes for each position of a row: 2 · l · k · h · bytes.

  Latent attention keeps l · (kv_rank + rope_dim) numbers.

  LLaMA-7B in fp16: 2 · 32 · 32 · 128 · 2 = 524,288, a GiB at 2,048 positions.
  """
  l, k, h = (config.dims[letter] for letter in "lkh")
  latent = config.attention.latent
  kept = latent.kv_rank + latent.rope_dim if latent.kv_rank else 2 * k * h
  return l * kept * dtype_bytes
