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
