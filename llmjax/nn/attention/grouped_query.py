"""Grouped-query attention: n query heads share k key/value heads, g = n / k queries to each."""

import dataclasses

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.choices import check_choice, check_least
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.nn.attention.context import CONTEXTS, attend_cut
from llmjax.nn.attention.kernels import KERNELS
from llmjax.nn.attention.mask import Mask, MaskSpec
from llmjax.nn.attention.scores import Scores
from llmjax.nn.bias import Bias
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import constant, fan_in, param
from llmjax.nn.position import rotate
from llmjax.parallel.rules import shard
from llmjax.parallel.tensor import column_parallel, row_parallel

MASKS = ("auto", "causal", "bidirectional", "prefix")
LAYERS = ("full", "window", "sparse")
QK_NORMS = ("none", "head", "all")
BIASES = ("none", "qkv", "all")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """Keys and values out of one short vector a position (`nn/attention/latent.py`).

  Attributes:
    kv_rank: channels of that vector (r); 0 means attention with keys and values of its own.
    query_rank: channels of a short vector that queries come out of; 0: straight from the stream.
    rope_dim: channels of a head that rope turns; their key is the same for all heads.
    nope_dim: channels of a head without position.
    value_dim: channels of a head's values.
  """

  kv_rank: int = 0
  query_rank: int = 0
  rope_dim: int = 0
  nope_dim: int = 0
  value_dim: int = 0

  def __post_init__(self):
    section = "model.attention.latent"
    check_least(section, self, kv_rank=0, query_rank=0)
    if not self.kv_rank and any(dataclasses.astuple(self)):
      raise UserError(f"{section} changes nothing without {section}.kv_rank")
    if self.kv_rank:
      check_least(section, self, rope_dim=2, nope_dim=1, value_dim=1)
      if self.value_dim > self.head_dim:
        raise UserError(f"{section}.value_dim {self.value_dim} is above nope_dim + rope_dim")

  @property
  def head_dim(self) -> int:
    """Channels of a head's queries and keys."""
    return self.nope_dim + self.rope_dim


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Who looks at whom, and how scores are made.

  Attributes:
    mask: causal; bidirectional; prefix (causal, but all see a document's prefix); auto is causal in
      a decoder, bidirectional in an encoder.
    pattern: kinds of successive layers, repeated: full, window, sparse.
    window: positions a window layer sees on each side it may look to, its own counted.
    sparse_block: positions of a block in sparse layers.
    sparse_local: blocks a sparse layer sees: its own and the (sparse_local - 1) next to it.
    sparse_global: so many first blocks of a document see all and are seen by all.
    sparse_stride: every so many-th block away is seen as well; 0 is none.
    softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
    sinks: a learned score a head that takes weight and gives no value.
    qk_norm: norm of queries and keys: none, each head by itself, all heads as one vector.
    bias: biases on none, on qkv, on all four projections.
    scale: factor on q · k; 0 means 1 / √h.
    kernel: auto, direct, blockwise, splash (TPU), cudnn (GPU).
    block: queries a strip of blockwise attention.
    context_parallel: what happens where positions are cut: ring, gather, all_to_all.
    latent: multi-head latent attention. Yarn's factor on its scores, (0.1 mscale ln(factor) + 1)²
      / √h in DeepSeek's words, is `scale`.
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
    for key, known in (
      ("mask", MASKS), ("qk_norm", QK_NORMS), ("bias", BIASES), ("kernel", KERNELS),
      ("context_parallel", CONTEXTS),
    ):
      check_choice(f"model.attention.{key}", getattr(self, key), known)
    for kind in self.pattern:
      check_choice("model.attention.pattern", kind, LAYERS)
    check_least(
      "model.attention", self, window=0, sparse_block=1, sparse_local=1, sparse_global=0,
      sparse_stride=0, softcap=0, scale=0, block=16,
    )
    if not self.pattern:
      raise UserError("model.attention.pattern is empty; write ('full',)")
    if ("window" in self.pattern) != (self.window > 0):
      raise UserError(
        f"model.attention.window {self.window} and pattern {self.pattern} do not go together: "
        "a window needs window layers, and they need a window"
      )
    if self.latent.kv_rank and (self.sinks, self.qk_norm, self.bias) != (False, "none", "none"):
      raise UserError("latent attention has no sinks, qk_norm or bias: leave model.attention's")

  def rule(self, layer: str, causal: bool) -> MaskSpec:
    """The mask's rule in a kind of layer."""
    if layer == "window":
      return MaskSpec(causal, window=self.window)
    if layer == "sparse":
      return MaskSpec(
        causal, 0, self.sparse_block, self.sparse_local, self.sparse_global, self.sparse_stride
      )
    return MaskSpec(causal)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
  """What a layer sees from where: alike for all layers of one kind.

  Attributes:
    mask: who may look at whom; its keys are the cache's slots where there is a cache.
    rope: (cos, sin) of the positions, or None.
    bias: added to scores by distance, or None.
  """

  mask: Mask
  rope: tuple | None = None
  bias: Bias | None = None


class Attention(nnx.Module):
  """Attention of a row to itself, to a cache, or to another row's keys and values.

  Args:
    key: PRNG key of this module.
    dims: sizes of d, n, k and h.
    config: scores, biases and kernel.
    norm: kind and eps of the norm of queries and keys.
    layout: channel pairs that rope turns.
    out_scale: factor on the output projection's initial standard deviation.
  """

  def __init__(
    self, key, dims, config: AttentionConfig, norm: NormConfig, layout: str, out_scale: float
  ):
    self.config = config
    self.layout = layout
    param(self, key, "query_dnh", dims, fan_in(dims, "d"))
    param(self, key, "key_dkh", dims, fan_in(dims, "d"))
    param(self, key, "value_dkh", dims, fan_in(dims, "d"))
    param(self, key, "out_nhd", dims, fan_in(dims, "nh", out_scale))
    if config.bias != "none":
      param(self, key, "query_bias_nh", dims, constant(0.0), "bias")
      param(self, key, "key_bias_kh", dims, constant(0.0), "bias")
      param(self, key, "value_bias_kh", dims, constant(0.0), "bias")
    if config.bias == "all":
      param(self, key, "out_bias_d", dims, constant(0.0), "bias")
    if config.sinks:
      param(self, key, "sinks_n", dims, constant(0.0), "bias")
    if config.qk_norm != "none":
      together = config.qk_norm == "all"
      norm = dataclasses.replace(norm, bias=False)
      self.query_norm = Norm(key, dims, norm, "nh" if together else "h")
      self.key_norm = Norm(key, dims, norm, "kh" if together else "h")

  def __call__(self, x_btd, view: AttentionInputs, positions_bt, cache: KVCache | None = None):
    """Mixes a row's positions.

    Args:
      x_btd: normed residual stream.
      view: mask, rope and bias.
      positions_bt: slots that new keys and values are written to.
      cache: this layer's keys and values so far.
    Returns:
      (y_btd, the cache with the new positions in it).
    """
    q_btnh, k_bskh, v_bskh = self._project(x_btd, query="n", key="k", value="k")
    q_btnh, new = self._queries(q_btnh, view), self._pair(k_bskh, v_bskh, view)
    if cache is not None:
      cache = new = cache.write(new, positions_bt)
    return self._mix(q_btnh, new, view), cache

  def cross_attend(self, x_btd, source: KVCache, view: AttentionInputs):
    """Mixes another row's values into each position (cross attention): y_btd."""
    return self._mix(self._queries(*self._project(x_btd, query="n"), view), source, view)

  def keys_and_values(self, x_bsd, view: AttentionInputs | None = None) -> KVCache:
    """Projects what is looked at; keys come out normed and rotated."""
    return self._pair(*self._project(x_bsd, key="k", value="k"), view)

  def _pair(self, k_bskh, v_bskh, view: AttentionInputs | None) -> KVCache:
    if self.config.qk_norm != "none":
      k_bskh = self.key_norm(k_bskh)
    if view is not None and view.rope is not None:
      k_bskh = rotate(k_bskh, *view.rope, self.layout)
    k_bskh, v_bskh = shard(k_bskh, "btkh"), shard(v_bskh, "btkh")
    return KVCache.of(checkpoint_name(k_bskh, "key"), checkpoint_name(v_bskh, "value"))

  def _queries(self, q_btnh, view: AttentionInputs):
    if self.config.qk_norm != "none":
      q_btnh = self.query_norm(q_btnh)
    if view.rope is not None:
      q_btnh = rotate(q_btnh, *view.rope, self.layout)
    return checkpoint_name(shard(q_btnh, "btnh"), "query")

  def _project(self, x_btd, **heads: str) -> tuple:
    """Projects the stream into queries, keys, values, whichever are given with heads' letter."""
    paths = [f"{name}_d{n}h" for name, n in heads.items()]
    if self.config.bias != "none":
      paths += [f"{name}_bias_{n}h" for name, n in heads.items()]

    def project(x_btd, weights):
      made = []
      for name, n in heads.items():
        y = dot(f"btd,d{n}h->bt{n}h", x_btd, weights[f"{name}_d{n}h"])
        bias = weights.get(f"{name}_bias_{n}h")
        made.append(y if bias is None else y + bias.astype(y.dtype))
      return tuple(made)

    weights = {path: getattr(self, path) for path in paths}
    return column_parallel(project, x_btd, weights, tuple(f"bt{n}h" for n in heads.values()))

  def _mix(self, q_btnh, source: KVCache, view: AttentionInputs):
    config = self.config
    scale = config.scale or q_btnh.shape[-1] ** -0.5
    sinks_n = self.sinks_n if config.sinks else None
    o_btnh = attend_cut(
      q_btnh, source.key_bskh, source.value_bskh, view.mask,
      Scores(scale, config.softcap, view.bias, sinks_n),
      config.kernel, config.block, config.context_parallel,
    )
    o_btnh = shard(o_btnh, "btnh")
    project = lambda o_btnh, weights: dot("btnh,nhd->btd", o_btnh, weights["out_nhd"])  # noqa: E731
    y_btd = row_parallel(project, o_btnh, {"out_nhd": self.out_nhd}, "btnh")
    return y_btd + self.out_bias_d.astype(y_btd.dtype) if config.bias == "all" else y_btd
