"""One transformer block: attention and mlp, each on the residual stream, between their norms."""

import dataclasses

import jax
from flax import nnx

from llmjax.models.config import ModelConfig
from llmjax.nn.attention import Attention, View
from llmjax.nn.cache import KVCache
from llmjax.nn.dropout import dropout
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import Norm


class Block(nnx.Module):
  """A block of any stack.

  Args:
    key: PRNG key of this block.
    config: the architecture.
    cross: it also looks at another stack's result.
  """

  def __init__(self, key, config: ModelConfig, cross: bool = False):
    dims, place = config.dims, config.norm.place
    keys = iter(jax.random.split(key, 12))
    sublayers = 3 if cross else 2
    out_scale = (sublayers * config.layers) ** -0.5  # keeps the stream's variance near one
    layout = config.position.layout
    attention, norm = config.attention, config.norm
    self.config = config
    self.cross = cross
    self.attention_norm = Norm(next(keys), dims, norm)
    self.attention = Attention(next(keys), dims, attention, norm, layout, out_scale)
    if config.block != "parallel_shared":
      self.mlp_norm = Norm(next(keys), dims, norm)
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
    self,
    x_btd,
    view: View,
    positions_bt,
    cache: KVCache | None = None,
    source: KVCache | None = None,
    source_view: View | None = None,
    key=None,
  ):
    """Advances the residual stream.

    Args:
      x_btd: residual stream.
      view: what this kind of layer sees of the row.
      positions_bt: slots that new keys and values are written to.
      cache: this layer's keys and values so far.
      source: keys and values of the other stack's result.
      source_view: what is seen of it.
      key: PRNG key of dropout; None drops nothing.
    Returns:
      (x_btd, cache).
    """
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    if self.config.block != "sequential":
      return self._parallel(x_btd, view, positions_bt, cache, keys)
    kept = []

    def mix(normed_btd):
      mixed, new = self.attention(normed_btd, view, positions_bt, cache)
      kept.append(new)
      return mixed

    x_btd = self._add(x_btd, "attention", mix, keys[0])
    if self.cross:
      look = lambda normed_btd: self.cross_attention.look_at(normed_btd, source, source_view)  # noqa: E731
      x_btd = self._add(x_btd, "cross", look, keys[1])
    return self._add(x_btd, "mlp", self.mlp, keys[2]), kept[0]

  def _add(self, x_btd, name, sublayer, key):
    """Adds a sublayer's result to the stream, normed where the config says."""
    norm = getattr(self, f"{name}_norm")
    rate = self.config.dropout
    match self.config.norm.place:
      case "pre":
        return x_btd + dropout(sublayer(norm(x_btd)), rate, key)
      case "post":
        return norm(x_btd + dropout(sublayer(x_btd), rate, key))
      case "output":
        return x_btd + dropout(norm(sublayer(x_btd)), rate, key)
      case "sandwich":
        out_norm = getattr(self, f"{name}_out_norm")
        return x_btd + dropout(out_norm(sublayer(norm(x_btd))), rate, key)

  def _parallel(self, x_btd, view, positions_bt, cache, keys):
    """x + attention(norm x) + mlp(norm x), as in GPT-J (shared norm) and GPT-NeoX."""
    normed_btd = self.attention_norm(x_btd)
    mixed_btd, cache = self.attention(normed_btd, view, positions_bt, cache)
    if self.config.block == "parallel":
      normed_btd = self.mlp_norm(x_btd)
    made_btd = self.mlp(normed_btd)
    if self.config.norm.place == "sandwich":
      mixed_btd, made_btd = self.attention_out_norm(mixed_btd), self.mlp_out_norm(made_btd)
    rate = self.config.dropout
    return x_btd + dropout(mixed_btd, rate, keys[0]) + dropout(made_btd, rate, keys[2]), cache
