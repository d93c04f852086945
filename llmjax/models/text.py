"""Text models: embedding, stack of blocks, head. One class, one function for training, scoring,
prefill and decoding; decoder, encoder (BERT) and encoder-decoder (T5) are its cases."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import dot
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack, kept_positions, positions_of
from llmjax.models.vision import Projector, Tower, tower_config
from llmjax.nn.cache.dense import Cache
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import Embed
from llmjax.nn.mlp import PLAIN
from llmjax.nn.norm import Norm
from llmjax.nn.param import constant, fan_in, param


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


class Decoder(TextModel):
  """A causal (or prefix) language model."""

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    super().__init__(keys[0], config)
    self.decoder = Stack(keys[1], config, config.causal)
    if config.vision.image_size:
      self.vision = Tower(keys[2], tower_config(config))
      self.projector = Projector(keys[3], config)

  def init_cache(self, batch: Batch, slots: int, chunk: int | None = None) -> Cache:
    """Makes the empty cache of a batch; every kind that decodes has this function."""
    return self.decoder.empty_cache(len(batch.tokens_bt), slots, chunk)

  def _images(self, batch: Batch, key):
    """(where image tokens are, their patches' vectors there), or None."""
    if batch.patches_bsi is None:
      return None
    x_bsd = self.projector(self.vision.features(batch.patches_bsi, key))
    is_image_bt = batch.tokens_bt == self.config.vision.image_token
    patch_bt = jnp.clip(jnp.cumsum(is_image_bt, axis=1) - 1, 0, x_bsd.shape[1] - 1)
    return is_image_bt, jnp.take_along_axis(x_bsd, patch_bt[..., None], axis=1)


class Encoder(TextModel):
  """A bidirectional model of text; its cache is None.

  Source: Devlin et al. 2018, arXiv:1810.04805.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    super().__init__(keys[0], config)
    self.encoder = Stack(keys[1], config, config.causal)
    dims = config.dims | {"i": config.width}
    param(self, keys[2], "transform_id", dims, fan_in(dims, "i"), "table")
    param(self, keys[2], "transform_bias_d", dims, constant(0.0), "bias")
    self.transform_norm = Norm(keys[2], dims, config.norm)
    param(self, keys[3], "pooler_id", dims, fan_in(dims, "i"), "table")
    param(self, keys[3], "pooler_bias_d", dims, constant(0.0), "bias")

  def _transform(self, x_btd):
    x_btd = dot("bti,id->btd", x_btd, self.transform_id)
    x_btd = PLAIN["gelu"](x_btd + self.transform_bias_d.astype(x_btd.dtype))
    return self.transform_norm(x_btd)

  def pooler(self, x_bd):
    """BERT's vector of a text: tanh of a projection of the first token's."""
    return jnp.tanh(dot("bi,id->bd", x_bd, self.pooler_id) + self.pooler_bias_d)


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
