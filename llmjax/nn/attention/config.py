"""`AttentionConfig`: mask, scores, kernel, and a section for each variant of attention."""

import dataclasses

from llmjax.core.choices import check_choice, check_fields
from llmjax.core.errors import UserError
from llmjax.nn.attention.context import CONTEXTS
from llmjax.nn.attention.grouped_query import GroupedQuery
from llmjax.nn.attention.kernels import KERNELS
from llmjax.nn.attention.latent import LatentConfig
from llmjax.nn.attention.mask import MaskSpec
from llmjax.nn.attention.variant import AttentionVariant
from llmjax.nn.variant import chosen

CHOICES = {
  "mask": ("auto", "causal", "bidirectional", "prefix"),
  "qk_norm": ("none", "head", "all"),
  "bias": ("none", "qkv", "all"),
  "kernel": KERNELS,
  "context_parallel": CONTEXTS,
}
LAYERS = ("full", "window", "sparse")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Masks, scores and kernel of attention. A new variant adds its section as a field.

  Attributes:
    mask: causal; bidirectional; prefix (causal, but all of a document attends to its prefix);
      auto is causal in a decoder, bidirectional in an encoder.
    pattern: kinds of successive layers, repeated: full, window, sparse.
    window: positions that a window layer attends to in each allowed direction, the query's counted.
    sparse_block: positions of a block in sparse layers.
    sparse_local: blocks a sparse layer attends to: the query's and (sparse_local - 1) next to it.
    sparse_global: this many first blocks of a document attend to all and are attended to by all.
    sparse_stride: blocks at multiples of this distance are attended to as well; 0 is none.
    softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
    sinks: a learned score for each head that takes weight and contributes no value.
    qk_norm: norm of queries and keys: none, each head by itself, all heads as one vector.
    bias: biases on none, on qkv, on all four projections.
    scale: factor on q · k; 0 means 1 / √h.
    kernel: auto, direct, blockwise, splash (TPU), cudnn (GPU).
    block: queries in a block of blockwise attention.
    context_parallel: method where positions are sharded: ring, gather, all_to_all.
    latent: multi-head latent attention. YaRN's factor on its scores, (0.1 mscale ln(factor) + 1)²
      / √h in DeepSeek's terms, is `scale`.
  """

  mask: str = "auto"
  pattern: tuple = ("full",)
  window: int = 0
  sparse_block: int = 64
  sparse_local: int = 2
  sparse_global: int = 1
  sparse_stride: int = 0
  softcap: float = 0.0
  sinks: bool = False
  qk_norm: str = "none"
  bias: str = "none"
  scale: float = 0.0
  kernel: str = "auto"
  block: int = 128
  context_parallel: str = "ring"
  latent: LatentConfig = LatentConfig()

  def __post_init__(self):
    check_fields(
      "model.attention", self, **CHOICES, window=0, sparse_block=1, sparse_local=1, sparse_global=0,
      sparse_stride=0, softcap=0, scale=0, block=16,
    )
    for kind in self.pattern:
      check_choice("model.attention.pattern", kind, LAYERS)
    if not self.pattern:
      raise UserError("model.attention.pattern is empty; write ('full',)")
    if ("window" in self.pattern) != (self.window > 0):
      raise UserError(
        f"model.attention.window {self.window} and pattern {self.pattern} do not go together: "
        "a window needs window layers, and they need a window"
      )

  @property
  def variant(self) -> AttentionVariant:
    """The variant of attention that the sections select."""
    return chosen(self, AttentionVariant, GroupedQuery())

  def shrunk(self, devices: int, head_dim: int) -> "AttentionConfig":
    """The config with a small section in use; arguments as of `AttentionVariant.shrunk`."""
    names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is self.variant]
    small = {name: self.variant.shrunk(devices, head_dim) for name in names}
    return dataclasses.replace(self, **small)

  def rule(self, layer: str, causal: bool) -> MaskSpec:
    """The mask of a kind of layer."""
    if layer == "sparse":
      keys = ("sparse_block", "sparse_local", "sparse_global", "sparse_stride")
      return MaskSpec(causal, **{key: getattr(self, key) for key in keys})
    return MaskSpec(causal, window=self.window if layer == "window" else 0)
