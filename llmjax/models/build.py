"""From a config to a model: the table of kinds, and what can be told without making an array."""

import functools
import math

import jax
from flax import nnx

from llmjax.core.weight import LoRA, is_kind
from llmjax.models.config import ModelConfig
from llmjax.models.kinds import apply_kinds
from llmjax.models.text import Decoder, Encoder, EncoderDecoder
from llmjax.models.vision import Vision

KINDS = {
  "decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "vision": Vision
}


def build(key, config: ModelConfig) -> nnx.Module:
  """Makes a model with random weights; `config.vocab_size` must be filled in.

  Returns:
    A module with `hidden(batch, cache, key) -> (x_btd, cache, stats)` and `logits(x_btd)`.
  """
  model = KINDS[config.kind](key, config)
  return apply_kinds(model, config.weights, jax.random.fold_in(key, 1))


@functools.lru_cache(maxsize=64)
def abstract(config: ModelConfig) -> nnx.Module:
  """Builds the model's tree of shapes without making an array, whatever its size."""
  return jax.eval_shape(lambda: build(jax.random.key(0), config))


@functools.cache
def count_parameters(config: ModelConfig) -> int:
  """Counts the weights of a config, those of adapters too; codes count as what they stand for."""

  def size(weight) -> int:
    if isinstance(weight, LoRA):
      return size(weight.base) + weight.a.size + weight.b.size
    return math.prod(weight.shape)

  return sum(map(size, jax.tree.leaves(abstract(config), is_leaf=is_kind)))
