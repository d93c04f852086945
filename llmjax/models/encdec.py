"""The encoder-decoder (T5): a decoder whose every layer attends to an encoder's result."""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.models.text import TextModel, split_or_none
from llmjax.nn.cache.dense import Cache
from llmjax.nn.embed import Embed


class EncoderDecoder(TextModel):
  """A model of a target given a source; they share the token table unless the source has another.

  Source: Raffel et al. 2019, arXiv:1910.10683, sec. 2.1.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 3)
    super().__init__(keys[0], config)
    if config.source_vocab_size:
      dims = config.dims | {"v": config.source_vocab_size}
      plain = dataclasses.replace(config.embed, head_bias=False)
      self.source_embed = Embed(
        jax.random.fold_in(keys[0], 1), dims, plain, config.position, config.norm, tied=True
      )
    layers = config.encoder_layers or config.layers
    self.encoder = Stack(keys[1], config, causal=False, layers=layers)
    self.decoder = Stack(keys[2], config, causal=True, cross=True)

  @property
  def stack(self) -> Stack:
    return self.decoder

  def embed_tokens(self, batch: Batch, key=None):
    return self._embed(batch, split_or_none(key, 3)[1])

  def layer_inputs(self, batch: Batch, key=None, cache: Cache | None = None):
    """See `TextModel`; with a cache, the source is read from it and not from the batch."""
    keys = split_or_none(key, 3)
    memory = self.encode(batch, keys[0]) if cache is None else (None, cache.source_segments_bs)
    return self.decoder.layer_inputs(batch, keys[2], cache, *memory)

  def encode(self, batch: Batch, key=None):
    """Encodes the source: (memory_bsd, its segment numbers [b, s])."""
    keys = split_or_none(key, 2)
    segments_bs = batch.source_segments_bs
    if segments_bs is None:
      segments_bs = jnp.ones_like(batch.source_bs)
    source = Batch(
      batch.source_bs, segments_bt=segments_bs, positions_bt=batch.source_positions_bs
    )
    x_bsd = self._embed(source, keys[0], embed=getattr(self, "source_embed", self.embed))
    return self.encoder(x_bsd, self.encoder.layer_inputs(source, keys[1]))[0], segments_bs

  def init_cache(self, batch: Batch, slots: int, chunk: int | None = None) -> Cache:
    """Encodes the source, one document a row, and makes the empty cache of the target."""
    memory_bsd, segments_bs = self.encode(batch)
    empty = self.decoder.empty_cache(len(batch.source_bs), slots, chunk)
    source = self.decoder.project_memory(memory_bsd)
    return dataclasses.replace(empty, source=source, source_segments_bs=segments_bs)
