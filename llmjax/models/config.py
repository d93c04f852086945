"""`ModelConfig`: an architecture as values."""

import dataclasses
from collections.abc import Iterator

from llmjax.core.choices import check_choice, check_fields, check_finite
from llmjax.core.errors import UserError
from llmjax.models.kinds import checked_rows
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.dropout import NAMES
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.mlp import ACTIVATIONS, Dense
from llmjax.nn.moe import MoeConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.nn.variant import FeedForward, chosen

KINDS = ("decoder", "encoder", "encoder_decoder", "vision")
BLOCKS = ("sequential", "parallel", "parallel_shared")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots", "save_projections", "offload")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Image patches and, in a decoder, the image tower.

  Attributes:
    image_size: side of an image in pixels; 0 means a model without images.
    patch: side of a patch in pixels, a divisor of `image_size`.
    channels: numbers per pixel.
    class_token: a learned vector before the patches.
    patch_bias: a bias on the patch projection.
    image_token: in a decoder: id whose occurrences are replaced by patches, in order.
    layers: in a decoder: blocks of the tower; likewise width, heads, mlp_width, activation, eps.
    input_norm: in a decoder: a norm before the tower's first block (CLIP).
  """

  image_size: int = 0
  patch: int = 16
  channels: int = 3
  class_token: bool = True
  patch_bias: bool = True
  image_token: int = -1
  layers: int = 0
  width: int = 0
  heads: int = 0
  mlp_width: int = 0
  activation: str = "quick_gelu"
  eps: float = 1e-5
  input_norm: bool = True

  def __post_init__(self):
    check_fields(
      "model.vision", self, image_size=0, patch=1, channels=1, image_token=-1, layers=0, width=0,
      heads=0, mlp_width=0, activation=ACTIVATIONS,
    )
    if self.image_size % self.patch:
      raise UserError(
        f"model.vision.image_size {self.image_size} is not a multiple of patch {self.patch}"
      )

  @property
  def patches(self) -> int:
    """Patches per image."""
    return (self.image_size // self.patch) ** 2

  @property
  def patch_numbers(self) -> int:
    """Numbers per patch (i)."""
    return self.patch**2 * self.channels


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A transformer.

  Attributes:
    kind: decoder; encoder (BERT-type); encoder_decoder (T5-type); vision (ViT, an image's class).
    layers: blocks (l); of the decoder in an encoder_decoder.
    encoder_layers: blocks of an encoder_decoder's encoder; 0 means `layers`.
    width: residual width (d).
    heads: query heads (n).
    kv_heads: key/value heads (k), a divisor of `heads`; 0 means `heads`.
    head_dim: head width (h); 0 means width / heads.
    mlp_width: feed-forward width (f).
    activation: swiglu, geglu, geglu_tanh, reglu (gated), relu, relu2, gelu, gelu_tanh, quick_gelu,
      silu.
    mlp_bias: biases in the feed-forward layer.
    block: attention then mlp (sequential), or both of one input (parallel), with a shared norm
      (parallel_shared).
    vocab_size: tokens (v); 0 means the tokenizer's. Classes of a vision model.
    source_vocab_size: tokens of an encoder_decoder's source, which then has a separate embedding
      (OpenNMT, Marian); 0 means that source and target share vocabulary and embedding (T5).
    max_seq_len: positions of a training row, and the most of a prompt with its continuation.
    tie_embeddings: the output head reads the embedding.
    dropout: rate at the embedding's and every sublayer's output.
    dtype: compute dtype; weights are always kept in float32.
    scan: run the layers as one `lax.scan` (compiles fast) instead of unrolled (runs fast on CPU).
    remat: what the backward pass recomputes: none; full; all but matrix products (dots); all but
      projections and attention's result (save_projections); likewise, with these in host memory
      (offload); all but some of these by name, such as query+key+value.
    weights: rows (pattern, {"kind": …, option: value}) of weights that are lora (rank, alpha,
      base), int8 (activations), int4 (block), nf4 (block) or masked (keep). The first row that
      matches a path wins.
  """

  kind: str = "decoder"
  layers: int = 4
  encoder_layers: int = 0
  width: int = 256
  heads: int = 4
  kv_heads: int = 0
  head_dim: int = 0
  mlp_width: int = 768
  activation: str = "swiglu"
  mlp_bias: bool = False
  block: str = "sequential"
  vocab_size: int = 0
  source_vocab_size: int = 0
  max_seq_len: int = 256
  tie_embeddings: bool = True
  dropout: float = 0.0
  dtype: str = "bfloat16"
  scan: bool = True
  remat: str = "none"
  weights: tuple = ()
  attention: AttentionConfig = AttentionConfig()
  position: PositionConfig = PositionConfig()
  norm: NormConfig = NormConfig()
  embed: EmbedConfig = EmbedConfig()
  vision: VisionConfig = VisionConfig()
  moe: MoeConfig = MoeConfig()

  def __post_init__(self):
    check_finite("model", self)
    object.__setattr__(self, "weights", checked_rows(self.weights))
    check_fields(
      "model", self, kind=KINDS, activation=ACTIVATIONS, block=BLOCKS, dtype=DTYPES, layers=1,
      width=1, heads=1, mlp_width=1, max_seq_len=1, kv_heads=0, head_dim=0, encoder_layers=0,
      vocab_size=0, source_vocab_size=0, dropout="[0, 1)",
    )
    if not set(self.remat.split("+")) <= set(NAMES):
      check_choice("model.remat", self.remat, (*REMAT, *NAMES))
    if self.heads % self.dims["k"]:
      raise UserError(
        f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}"
      )
    self.attention.variant.check(self)
    self.feed_forward.check(self)
    if self.position.kind == "rope":
      self.position.check(self.rotary_head)
    if self.kind == "decoder" and self.vision.image_size:
      check_fields(
        "model.vision", self.vision, layers=1, width=1, heads=1, mlp_width=1, image_token=0,
        eps="positive",
      )
    for conflict in _conflicts(self):
      raise UserError(conflict)

  @property
  def dims(self) -> dict[str, int]:
    """Size of every letter of the model's weights."""
    n, k = self.heads, self.kv_heads or self.heads
    return {
      "l": self.layers, "d": self.width, "f": self.mlp_width, "n": n, "k": k, "g": n // k,
      "h": self.attention.variant.head_dim(self), "e": self.moe.experts, "v": self.vocab_size,
      "t": self.max_seq_len,
    }

  @property
  def rotary_head(self) -> int:
    """Channels of a head that `position.fraction` is a fraction of."""
    return self.attention.variant.rotary_dim(self)

  @property
  def feed_forward(self) -> FeedForward:
    """The kind of feed-forward layer that the sections select."""
    return chosen(self, FeedForward, Dense())

  def groups(self, layers: int) -> tuple[tuple[str, int, int, FeedForward], ...]:
    """Splits a stack of `layers` into groups with the same tree of weights.

    Returns:
      For each group (name in paths of parameters, first layer, layer to end before, its kind of
      feed-forward layer).
    """
    kind = self.feed_forward
    dense = kind.first_k_dense
    first = (("first", 0, dense, Dense()),) if dense else ()
    return (*first, ("blocks", dense, layers, kind))

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The kind of every layer, as `attention.pattern` repeats them."""
    pattern = self.attention.pattern
    return tuple(pattern[i % len(pattern)] for i in range(self.layers))

  @property
  def causal(self) -> bool:
    """Whether attention is causal (except within a prefix)."""
    if self.attention.mask == "auto":
      return self.kind in ("decoder", "encoder_decoder")
    return self.attention.mask != "bidirectional"


def _conflicts(config: ModelConfig) -> Iterator[str]:
  """Yields what values of a config do not go together."""
  kind, block, vision, width = config.kind, config.block, config.vision, config.width
  position, place, mask = config.position.kind, config.norm.place, config.attention.mask
  if position in ("sinusoidal_halves", "sinusoidal_t2t") and (width % 2 or width < 4):
    yield f"model.position.kind={position} needs an even model.width of at least 4, not {width}"
  if block != "sequential" and place not in ("pre", "sandwich"):
    yield f"model.block={block} needs model.norm.place pre or sandwich, not {place}"
  if kind == "encoder_decoder":
    if config.embed.types:
      yield "an encoder_decoder has no token types: set model.embed.types to 0"
    if mask != "auto":
      yield "an encoder_decoder decides its masks itself: leave model.attention.mask"
    if block != "sequential":
      yield "an encoder_decoder has sequential blocks: leave model.block"
  elif config.source_vocab_size:
    yield f"model.source_vocab_size is of an encoder_decoder; model.kind={kind} has no source"
  if kind in ("encoder", "encoder_decoder") and vision.image_size:
    yield f"model.kind={kind} takes no images: set model.vision.image_size to 0"
  if kind == "decoder" and vision.image_size and vision.width % vision.heads:
    yield (
      f"model.vision.width {vision.width} is not a multiple of model.vision.heads {vision.heads}"
    )
  if kind == "vision":
    if not vision.image_size:
      yield "model.kind=vision needs model.vision.image_size"
    if position != "learned":
      yield f"a vision model learns positions: set model.position.kind to learned, not {position}"
    if mask not in ("auto", "bidirectional"):
      yield f"a vision model is bidirectional, not model.attention.mask={mask}"
    if dataclasses.replace(config.embed, norm=False) != EmbedConfig():
      yield "a vision model has no token table: of model.embed, set norm alone"
