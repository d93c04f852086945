"""`ModelConfig`: the architecture, and what follows from it by arithmetic."""

import dataclasses

from llmjax.core.errors import UserError, nearest

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-type decoder.

  Attributes:
    layers: blocks (l).
    width: residual width (d).
    heads: query heads (n).
    kv_heads: key/value heads (k), a divisor of `heads`.
    head_dim: head width (h), even; 0 means width / heads.
    mlp_width: feed-forward width (f).
    vocab_size: tokens (v); 0 means the tokenizer's.
    context: positions of a training row, and the most a prompt and its continuation may fill.
    rope_theta: base of the rotary angles.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output head reads the embedding.
    dtype: compute dtype; weights are always kept in float32.
    scan: run the layers as one `lax.scan` (compiles fast) instead of unrolled (runs fast on CPU).
    remat: what the backward pass recomputes: none, full, or all but matrix products (dots).
  """

  layers: int = 4
  width: int = 256
  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 0
  mlp_width: int = 768
  vocab_size: int = 0
  context: int = 256
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  dtype: str = "bfloat16"
  scan: bool = True
  remat: str = "none"

  def __post_init__(self):
    for key, known in (("dtype", DTYPES), ("remat", REMAT)):
      if getattr(self, key) not in known:
        raise UserError(
          f"model.{key} {getattr(self, key)!r} is unknown; {nearest(getattr(self, key), known)}"
        )
    for key in ("layers", "width", "heads", "kv_heads", "mlp_width", "context"):
      if getattr(self, key) < 1:
        raise UserError(f"model.{key} {getattr(self, key)} is less than 1")
    if self.heads % self.kv_heads:
      raise UserError(
        f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}"
      )
    if not self.head_dim and self.width % self.heads:
      raise UserError(
        f"model.width {self.width} is not a multiple of model.heads {self.heads}; set head_dim"
      )
    if self.dims["h"] % 2:
      raise UserError(f"head width {self.dims['h']} is odd; rotary positions need it even")

  @property
  def dims(self) -> dict[str, int]:
    """Size of every letter of the model's weights."""
    return {
      "l": self.layers,
      "d": self.width,
      "n": self.heads,
      "k": self.kv_heads,
      "g": self.heads // self.kv_heads,
      "h": self.head_dim or self.width // self.heads,
      "f": self.mlp_width,
      "v": self.vocab_size,
    }


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
  """Counts the multiply-adds (×2) of one token's forward pass in a causal row of `length`.

  Matrix products and attention's two products only; a token sees (length + 1) / 2 keys on average.
  A training step costs three times as much.
  """
  d, n, k, h, f, v, l = (config.dims[letter] for letter in "dnkhfvl")
  layer = 2 * d * h * (2 * n + 2 * k) + 2 * 3 * d * f
  attention = 2 * 2 * n * h * (length + 1) / 2
  return l * (layer + attention) + 2 * d * v
