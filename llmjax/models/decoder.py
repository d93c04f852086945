"""The decoder: one function for training, scoring, prefill and decoding, with or without images."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.models.vision import Projector, Tower, tower_config
from llmjax.nn.cache import Cache
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import Embed


class Decoder(nnx.Module):
  """A causal (or prefix) language model.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    self.config = config
    self.embed = Embed(
      keys[0], config.dims, config.embed, config.position, config.norm, config.tie_embeddings
    )
    self.decoder = Stack(keys[1], config, config.causal)
    if config.vision.image_size:
      self.vision = Tower(keys[2], tower_config(config))
      self.projector = Projector(keys[3], config)

  def __call__(self, tokens_bt, segments_bt=None, positions_bt=None, cache: Cache | None = None):
    """Scores the next token at every position: (logits_btv in fp32, cache); see `hidden`."""
    batch = Batch(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt)
    x_btd, cache, _ = self.hidden(batch, cache)
    return self.logits(x_btd), cache

  def hidden(self, batch: Batch, cache: Cache | None = None, key=None):
    """Runs everything before the head.

    Args:
      batch: tokens, and whatever else the config knows: segments, positions, prefix, patches.
      cache: keys and values so far; new ones go to slot `positions_bt`.
      key: PRNG key of dropout; None drops nothing.
    Returns:
      (x_btd, the cache with these positions in it or None, what routers did or None).
    """
    x_btd = self.enter(batch, key)
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    return self.decoder(
      x_btd, positions_bt, batch.segments_bt, self._prefix(batch), cache, key=_keys(key)[1],
      tokens_bt=batch.tokens_bt,
    )

  def enter(self, batch: Batch, key=None):
    """Runs everything before the blocks: x_btd. Arguments as of `hidden`."""
    keys = _keys(key)
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    x_btd = self.embed(
      batch.tokens_bt,
      positions_bt,
      jnp.dtype(self.config.dtype),
      batch.types_bt,
      self._images(batch, keys[2]),
    )
    return dropout(x_btd, self.config.dropout, keys[0])

  def shared(self, batch: Batch, key=None):
    """Makes what all blocks are given alike. Arguments as of `hidden`."""
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    return self.decoder.shared(
      positions_bt, batch.segments_bt, self._prefix(batch), key=_keys(key)[1],
      tokens_bt=batch.tokens_bt,
    )

  def leave(self, x_btd):
    """Runs everything between the blocks and the head: x_btd."""
    return self.decoder.leave(x_btd)

  def _prefix(self, batch: Batch):
    return batch.prefix_bt if self.config.attention.mask == "prefix" else None

  @property
  def head(self) -> Embed:
    """The module whose `logits(x_btd)` scores every token."""
    return self.embed

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    return self.head.logits(x_btd)

  def empty_cache(self, batch: int, slots: int) -> Cache:
    """Makes a cache of `slots` positions for `batch` rows, in the compute dtype."""
    prefix_bs = None
    if self.config.attention.mask == "prefix":
      prefix_bs = jnp.zeros((batch, slots), bool)
    return Cache(self.decoder.empty_cache(batch, slots), prefix_bs=prefix_bs)

  def start(self, batch: Batch, slots: int) -> Cache:
    """Makes the empty cache of a batch; every kind that decodes has this function."""
    return self.empty_cache(len(batch.tokens_bt), slots)

  def _images(self, batch: Batch, key):
    """(where image tokens stand, their patches' vectors there), or None."""
    if batch.patches_bsi is None:
      return None
    made_bsd = self.projector(self.vision.features(batch.patches_bsi, key))
    here_bt = batch.tokens_bt == self.config.vision.image_token
    number_bt = jnp.clip(jnp.cumsum(here_bt, axis=1) - 1, 0, made_bsd.shape[1] - 1)
    return here_bt, jnp.take_along_axis(made_bsd, number_bt[..., None], axis=1)


def _keys(key) -> list:
  """Keys of embedding, blocks and images."""
  return [None] * 3 if key is None else list(jax.random.split(key, 3))


def default_positions(tokens_bt, positions_bt):
  """Counts 0, 1, 2 … along each row where no positions are given."""
  if positions_bt is not None:
    return positions_bt
  return jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
