"""One transformer block: attention and mlp, each on the residual stream, between their norms."""

import dataclasses
import functools

import jax
from flax import nnx

from llmjax.models.config import ModelConfig
from llmjax.nn.attention.grouped_query import Attention, AttentionInputs
from llmjax.nn.attention.latent import LatentAttention
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.dropout import dropout
from llmjax.nn.mlp import Mlp
from llmjax.nn.moe import Moe
from llmjax.nn.norm import Norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
  """What all blocks of a stack are given alike.

  Attributes:
    views: what each kind of layer sees of the row.
    positions_bt: slots that new keys and values are written to.
    source_view: what is seen of another stack's result.
    key: PRNG key of dropout and of noisy routers, a block's own inside it; None draws nothing.
    tokens_bt: int32 ids; None where there are none.
    real_bt: bool, False for padding; None: all are real.
  """

  views: dict[str, AttentionInputs]
  positions_bt: jax.Array
  source_view: AttentionInputs | None = None
  key: jax.Array | None = None
  tokens_bt: jax.Array | None = None
  real_bt: jax.Array | None = None


class Block(nnx.Module):
  """A block of any stack.

  Args:
    key: PRNG key of this block.
    config: the architecture.
    cross: it also looks at another stack's result.
    dense: its feed-forward layer is dense whatever `config.moe` says.
  """

  def __init__(self, key, config: ModelConfig, cross: bool = False, dense: bool = False):
    dims, place = config.dims, config.norm.place
    keys = iter(jax.random.split(key, 12))
    sublayers = 3 if cross else 2
    out_scale = (sublayers * config.layers) ** -0.5  # keeps the stream's variance near one
    layout = config.position.layout
    attention, norm = config.attention, config.norm
    self.config = config
    self.cross = cross
    self.attention_norm = Norm(next(keys), dims, norm)
    kind = LatentAttention if attention.latent.kv_rank else Attention
    self.attention = kind(next(keys), dims, attention, norm, layout, out_scale)
    if config.block != "parallel_shared":
      self.mlp_norm = Norm(next(keys), dims, norm)
    if config.moe.experts and not dense:
      self.moe = Moe(next(keys), dims, config.moe, config.activation, out_scale)
    else:
      self.mlp = Mlp(next(keys), dims, config.activation, config.mlp_bias, out_scale)
    if place == "sandwich":
      self.attention_out_norm = Norm(next(keys), dims, norm)
      self.mlp_out_norm = Norm(next(keys), dims, norm)
    if cross:
      plain = dataclasses.replace(attention, qk_norm="none", sinks=False)
      self.cross_norm = Norm(next(keys), dims, norm)
      self.cross_attention = Attention(next(keys), dims, plain, norm, layout, out_scale)
      if place == "sandwich":
        self.cross_out_norm = Norm(next(keys), dims, norm)

  def __call__(
    self, x_btd, kind: str, shared: LayerInputs, cache: KVCache | None = None,
    source: KVCache | None = None,
  ):
    """Advances the residual stream.

    Args:
      x_btd: residual stream.
      kind: of the layer, a key of `shared.views`.
      shared: see `Shared`.
      cache: this layer's keys and values so far.
      source: keys and values of the other stack's result.
    Returns:
      (x_btd, cache, what the router did or None).
    """
    keys = [None] * 3 if shared.key is None else jax.random.split(shared.key, 3)
    attend = functools.partial(
      self.attention, view=shared.views[kind], positions_bt=shared.positions_bt, cache=cache
    )
    think = functools.partial(self.feed_forward, shared=shared)
    if self.config.block != "sequential":
      return self._parallel(x_btd, attend, think, keys)
    x_btd, cache = self._add(x_btd, "attention", attend, keys[0])
    if self.cross:
      look = lambda normed_btd: (  # noqa: E731
        self.cross_attention.cross_attend(normed_btd, source, shared.source_view), None
      )
      x_btd, _ = self._add(x_btd, "cross", look, keys[1])
    x_btd, routing = self._add(x_btd, "mlp", think, keys[2])
    return x_btd, cache, routing

  def feed_forward(self, x_btd, shared: LayerInputs):
    """The feed-forward layer: (y_btd, what its router did or None)."""
    if not hasattr(self, "moe"):
      return self.mlp(x_btd), None
    key = None if shared.key is None else jax.random.fold_in(shared.key, 3)
    return self.moe(x_btd, shared.tokens_bt, shared.real_bt, key)

  def _add(self, x_btd, name, sublayer, key):
    """Adds the first of a sublayer's results to the stream, normed where the config says.

    Returns:
      (x_btd, the other result).
    """
    norm, place = getattr(self, f"{name}_norm"), self.config.norm.place
    y_btd, other = sublayer(norm(x_btd) if place in ("pre", "sandwich") else x_btd)
    if place == "output":
      y_btd = norm(y_btd)
    if place == "sandwich":
      y_btd = getattr(self, f"{name}_out_norm")(y_btd)
    x_btd = x_btd + dropout(y_btd, self.config.dropout, key)
    return norm(x_btd) if place == "post" else x_btd, other

  def _parallel(self, x_btd, attend, think, keys):
    """x + attention(norm x) + mlp(norm x), as in GPT-J (shared norm) and GPT-NeoX."""
    normed_btd = self.attention_norm(x_btd)
    mixed_btd, cache = attend(normed_btd)
    if self.config.block == "parallel":
      normed_btd = self.mlp_norm(x_btd)
    made_btd, routing = think(normed_btd)
    if self.config.norm.place == "sandwich":
      mixed_btd, made_btd = self.attention_out_norm(mixed_btd), self.mlp_out_norm(made_btd)
    rate = self.config.dropout
    x_btd = x_btd + dropout(mixed_btd, rate, keys[0]) + dropout(made_btd, rate, keys[2])
    return x_btd, cache, routing
