"""The decoder: one function for training, scoring, prefill and decoding, with or without images."""

import jax
import jax.numpy as jnp

from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.models.text import TextModel
from llmjax.models.vision import Projector, Tower, tower_config
from llmjax.nn.cache.dense import Cache


class Decoder(TextModel):
  """A causal (or prefix) language model.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    super().__init__(keys[0], config)
    self.decoder = Stack(keys[1], config, config.causal)
    if config.vision.image_size:
      self.vision = Tower(keys[2], tower_config(config))
      self.projector = Projector(keys[3], config)

  def empty_cache(self, batch: int, slots: int, chunk: int | None = None) -> Cache:
    """Makes a cache for `batch` rows; see `Stack.empty_cache`."""
    return self.decoder.empty_cache(batch, slots, chunk)

  def init_cache(self, batch: Batch, slots: int, chunk: int | None = None) -> Cache:
    """Makes the empty cache of a batch; every kind that decodes has this function."""
    return self.empty_cache(len(batch.tokens_bt), slots, chunk)

  def _images(self, batch: Batch, key):
    """(where image tokens stand, their patches' vectors there), or None."""
    if batch.patches_bsi is None:
      return None
    made_bsd = self.projector(self.vision.features(batch.patches_bsi, key))
    here_bt = batch.tokens_bt == self.config.vision.image_token
    number_bt = jnp.clip(jnp.cumsum(here_bt, axis=1) - 1, 0, made_bsd.shape[1] - 1)
    return here_bt, jnp.take_along_axis(made_bsd, number_bt[..., None], axis=1)
