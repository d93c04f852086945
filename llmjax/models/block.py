"""One transformer block: attention and feed-forward layer, with their norms."""

import dataclasses
import functools

import jax
from flax import nnx

from llmjax.models.config import ModelConfig
from llmjax.nn.attention.grouped_query import Attention
from llmjax.nn.attention.variant import AttentionInputs
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.dropout import dropout
from llmjax.nn.norm import Norm
from llmjax.nn.variant import FeedForward


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
  """Inputs that are the same for all blocks of a stack.

  Attributes:
    attention: the inputs of attention, by kind of layer.
    positions_bt: positions that new keys and values are written to the cache with.
    cross_attention: the inputs of cross-attention, or None.
    memory_bsd: what cross-attention attends to, where its keys and values are not in a cache.
    key: PRNG key of dropout and of noisy routers; None draws nothing.
    tokens_bt: int32 ids, or None.
    real_bt: bool, False for padding; None: all are real.
  """

  attention: dict[str, AttentionInputs]
  positions_bt: jax.Array
  cross_attention: AttentionInputs | None = None
  memory_bsd: jax.Array | None = None
  key: jax.Array | None = None
  tokens_bt: jax.Array | None = None
  real_bt: jax.Array | None = None


class Block(nnx.Module):
  """A block of any stack, with cross-attention if `cross`."""

  def __init__(self, key, config: ModelConfig, feed_forward: FeedForward, cross: bool = False):
    dims, attention, norm = config.dims, config.attention, config.norm
    keys = iter(jax.random.split(key, 12))
    out_scale = ((3 if cross else 2) * config.layers) ** -0.5  # the stream's variance is near one
    layout = config.position.layout
    self.config, self.cross, self.kind = config, cross, feed_forward
    self.attention_norm = Norm(next(keys), dims, norm)
    self.attention = attention.variant.layer(next(keys), dims, attention, norm, layout, out_scale)
    if config.block != "parallel_shared":
      self.mlp_norm = Norm(next(keys), dims, norm)
    setattr(self, feed_forward.name, feed_forward.layer(next(keys), config, out_scale))
    if norm.place == "sandwich":
      self.attention_out_norm = Norm(next(keys), dims, norm)
      self.mlp_out_norm = Norm(next(keys), dims, norm)
    if cross:
      plain = dataclasses.replace(attention, qk_norm="none", sinks=False)
      self.cross_norm = Norm(next(keys), dims, norm)
      self.cross_attention = Attention(next(keys), dims, plain, norm, layout, out_scale)
      if norm.place == "sandwich":
        self.cross_out_norm = Norm(next(keys), dims, norm)

  def __call__(
    self, x_btd, kind: str, inputs: LayerInputs, cache: KVCache | None = None,
    source: KVCache | None = None,
  ):
    """Runs the block: (x_btd, cache, the router's statistics or None).

    Args:
      kind: of the layer, a key of `inputs.attention`.
      source: keys and values of cross-attention; None projects them from `inputs.memory_bsd`.
    """
    keys = [None] * 3 if inputs.key is None else jax.random.split(inputs.key, 3)
    attend = functools.partial(
      self.attention, inputs=inputs.attention[kind], positions_bt=inputs.positions_bt, cache=cache
    )
    feed_forward = functools.partial(self.feed_forward, inputs=inputs)
    if self.config.block != "sequential":
      return self._parallel(x_btd, attend, feed_forward, keys)
    x_btd, cache = self._add(x_btd, "attention", attend, keys[0])
    if self.cross:
      source = source or self.cross_attention.keys_and_values(inputs.memory_bsd)
      cross_attend = lambda normed_btd: (  # noqa: E731
        self.cross_attention.cross_attend(normed_btd, source, inputs.cross_attention), None
      )
      x_btd, _ = self._add(x_btd, "cross", cross_attend, keys[1])
    x_btd, stats = self._add(x_btd, "mlp", feed_forward, keys[2])
    return x_btd, cache, stats

  def attention_weights(self, x_btd, kind: str, inputs: LayerInputs):
    """The weights of self-attention: fp32 [b, n, t, s]. Arguments as of `__call__`."""
    norm_first = self.config.norm.place in ("pre", "sandwich") or self.config.block != "sequential"
    x_btd = self.attention_norm(x_btd) if norm_first else x_btd
    return self.attention.weights(x_btd, inputs.attention[kind])

  def feed_forward(self, x_btd, inputs: LayerInputs):
    """Runs the feed-forward layer: (y_btd, the router's statistics or None)."""
    key = None if inputs.key is None else jax.random.fold_in(inputs.key, 3)
    layer = getattr(self, self.kind.name)
    return self.kind.run(layer, x_btd, inputs.tokens_bt, inputs.real_bt, key)

  def _add(self, x_btd, name, sublayer, key):
    """Adds a sublayer's first result to the stream: (x_btd, its second result)."""
    norm, place = getattr(self, f"{name}_norm"), self.config.norm.place
    y_btd, rest = sublayer(norm(x_btd) if place in ("pre", "sandwich") else x_btd)
    if place == "output":
      y_btd = norm(y_btd)
    if place == "sandwich":
      y_btd = getattr(self, f"{name}_out_norm")(y_btd)
    x_btd = x_btd + dropout(y_btd, self.config.dropout, key)
    return norm(x_btd) if place == "post" else x_btd, rest

  def _parallel(self, x_btd, attend, feed_forward, keys):
    """x + attention(norm x) + mlp(norm x), as in GPT-J (shared norm) and GPT-NeoX."""
    normed_btd = self.attention_norm(x_btd)
    attention_btd, cache = attend(normed_btd)
    if self.config.block == "parallel":
      normed_btd = self.mlp_norm(x_btd)
    mlp_btd, stats = feed_forward(normed_btd)
    if self.config.norm.place == "sandwich":
      attention_btd = self.attention_out_norm(attention_btd)
      mlp_btd = self.mlp_out_norm(mlp_btd)
    rate = self.config.dropout
    x_btd = x_btd + dropout(attention_btd, rate, keys[0]) + dropout(mlp_btd, rate, keys[2])
    return x_btd, cache, stats
