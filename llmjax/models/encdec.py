"""The encoder-decoder (T5-type): a decoder whose every layer looks at an encoder's result."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.decoder import default_positions
from llmjax.models.stack import Stack
from llmjax.nn.cache import Cache
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import Embed


class EncoderDecoder(nnx.Module):
  """A model of one text given another; both share the token table.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  Source: Raffel et al. 2019, arXiv:1910.10683, sec. 2.1.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 3)
    layers = config.encoder_layers or config.layers
    self.config = config
    self.embed = Embed(
      keys[0], config.dims, config.embed, config.position, config.norm, config.tie_embeddings
    )
    self.encoder = Stack(keys[1], config, causal=False, layers=layers)
    self.decoder = Stack(keys[2], config, causal=True, cross=True)

  def hidden(self, batch: Batch, cache: Cache | None = None, key=None):
    """Runs everything before the head.

    Args:
      batch: tokens and source, and whatever else is known: segments and positions of both.
      cache: made by `start`; the source is then read from it and not from the batch.
      key: PRNG key of dropout; None drops nothing.
    Returns:
      (x_btd, the cache with these positions in it or None, None: it has no experts).
    """
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    memory_bsd, source_segments_bs = None, None
    if cache is None:
      memory_bsd, source_segments_bs = self.encode(batch, keys[0])
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    x_btd = self.embed(batch.tokens_bt, positions_bt, jnp.dtype(self.config.dtype))
    return self.decoder(
      dropout(x_btd, self.config.dropout, keys[1]),
      positions_bt,
      batch.segments_bt,
      cache=cache,
      memory_bsd=memory_bsd,
      source_segments_bs=source_segments_bs,
      key=keys[2],
    )

  def encode(self, batch: Batch, key=None):
    """Reads the source: (memory_bsd, its document numbers [b, s])."""
    keys = [None, None] if key is None else jax.random.split(key)
    segments_bs = batch.source_segments_bs
    if segments_bs is None:
      segments_bs = jnp.ones_like(batch.source_bs)
    positions_bs = default_positions(batch.source_bs, batch.source_positions_bs)
    x_bsd = self.embed(batch.source_bs, positions_bs, jnp.dtype(self.config.dtype))
    x_bsd = dropout(x_bsd, self.config.dropout, keys[0])
    return self.encoder(x_bsd, positions_bs, segments_bs, key=keys[1])[0], segments_bs

  def start(self, batch: Batch, slots: int) -> Cache:
    """Reads the source once, and makes room for `slots` positions of what is to be written.

    A row's source is one document (number 1, padding 0).
    """
    memory_bsd, segments_bs = self.encode(batch)
    own = self.decoder.empty_cache(len(batch.source_bs), slots)
    return Cache(own, self.decoder.look_up(memory_bsd), segments_bs)

  @property
  def head(self) -> Embed:
    """The module whose `logits(x_btd)` scores every token."""
    return self.embed

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    return self.head.logits(x_btd)
