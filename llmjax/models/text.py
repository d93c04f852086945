"""The base class of text models: embedding, stack of blocks, and head."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack, kept_positions, positions_of
from llmjax.nn.cache.dense import Cache
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import Embed


class TextModel(nnx.Module):
  """Tokens to logits; a subclass adds its stack."""

  def __init__(self, key, config: ModelConfig):
    self.config = config
    self.embed = Embed(
      key, config.dims, config.embed, config.position, config.norm, config.tie_embeddings
    )

  def __call__(self, tokens_bt, segments_bt=None, positions_bt=None, cache: Cache | None = None):
    """Scores every token at every position: (logits_btv in fp32, cache); see `hidden`."""
    batch = Batch(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt)
    x_btd, cache, _ = self.hidden(batch, cache)
    return self.logits(x_btd), cache

  @property
  def stack(self) -> Stack:
    """The stack whose result the head reads, by default the attribute named like the kind."""
    return getattr(self, self.config.kind)

  @property
  def head(self) -> Embed:
    """The module whose `logits(x_btd)` scores every token."""
    return self.embed.only_head()

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    return self.head.logits(x_btd)

  def hidden(self, batch: Batch, cache: Cache | None = None, key=None):
    """Runs everything before the head.

    Args:
      batch: tokens, and what else the config uses: segments, positions, types, prefix, patches,
        source.
      cache: keys and values so far; new ones are written with `positions_bt`.
      key: PRNG key of dropout; None drops nothing.
    Returns:
      (x_btd, the cache with these positions in it or None, routers' statistics or None).
    """
    x_btd, cache, stats = self._run(batch, cache, key)
    return self._transform(x_btd), cache, stats

  def features(self, batch: Batch, key=None):
    """Runs the blocks: x_btd, the input of pooling. Arguments as of `hidden`."""
    return self._run(batch, None, key)[0]

  def _run(self, batch: Batch, cache: Cache | None, key):
    x_btd = self.embed_tokens(batch, key)
    if cache is not None:
      cache = cache.reserve(kept_positions(batch), batch.prefix_bt)
    return self.stack(x_btd, self.layer_inputs(batch, key, cache), cache)

  def embed_tokens(self, batch: Batch, key=None):
    """Runs everything before the blocks: x_btd. Arguments as of `hidden`."""
    keys = split_or_none(key, 3)
    return self._embed(batch, keys[0], self._images(batch, keys[2]))

  def layer_inputs(self, batch: Batch, key=None, cache: Cache | None = None):
    """Makes the inputs that all blocks share. Arguments as of `hidden`."""
    return self.stack.layer_inputs(batch, split_or_none(key, 3)[1], cache)

  def final_norm(self, x_btd):
    """Runs everything between the blocks and the head: x_btd."""
    return self._transform(self.stack.final_norm(x_btd))

  def _embed(self, batch: Batch, key, images=None, embed: Embed | None = None):
    dtype, embed = jnp.dtype(self.config.dtype), embed or self.embed
    x_btd = embed(batch.tokens_bt, positions_of(batch), dtype, batch.types_bt, images)
    return dropout(x_btd, self.config.dropout, key)

  def _images(self, batch: Batch, key):
    """What replaces image tokens, in a kind that has them."""

  def _transform(self, x_btd):
    """What is between the stack and the head."""
    return x_btd


def split_or_none(key, number: int):
  """Splits a PRNG key of dropout, or None."""
  return [None] * number if key is None else jax.random.split(key, number)
