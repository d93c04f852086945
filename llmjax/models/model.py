"""`Model`: a config, its parameters and a tokenizer, as `llmjax.load` returns them."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.depth import unstack_layers, views
from llmjax.models.pooling import Pooling
from llmjax.models.processor import Processor
from llmjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
  """A model ready for use.

  Attributes:
    config: the architecture.
    parameters: the module, itself a tree of fp32 arrays.
    tokenizer: text to ids and back; None where the checkpoint has none.
    pooling: how it makes one vector of a text; None where its files say nothing of it.
    processor: how its images are prepared; likewise.
  """

  config: ModelConfig
  parameters: nnx.Module
  tokenizer: Tokenizer | None = None
  pooling: Pooling | None = None
  processor: Processor | None = None

  @functools.cached_property
  def decoding(self) -> nnx.Module:
    """The parameters with every layer by itself, made at the first use: what decoding reads.

    On a CPU its weights are the same memory as those of `parameters`.
    """
    places = set().union(*(leaf.devices() for leaf in jax.tree.leaves(self.parameters)))
    if places == {jax.devices()[0]} and jax.default_backend() == "cpu":
      return unstack_layers(self.parameters, views)
    return jax.jit(unstack_layers)(self.parameters)

  def logits(self, tokens_bt):
    """Scores the next token at every position.

    Args:
      tokens_bt: int ids, each row one document from position 0.
    Returns:
      logits_btv, fp32.
    Raises:
      UserError: rows longer than the context, an id outside the vocabulary, or a kind of model
        that does not read tokens alone.
    """
    if self.config.kind in ("encoder_decoder", "vision"):
      raise UserError(f"logits wants a decoder or an encoder, not model.kind={self.config.kind}")
    tokens_bt = np.asarray(tokens_bt, np.int32)
    if tokens_bt.ndim != 2:
      raise UserError(f"tokens_bt has rank {tokens_bt.ndim}; logits wants [batch, positions]")
    if tokens_bt.shape[1] > self.config.max_seq_len:
      raise UserError(
        f"{tokens_bt.shape[1]} tokens are more than the context of {self.config.max_seq_len}"
      )
    if tokens_bt.size and not 0 <= tokens_bt.min() <= tokens_bt.max() < self.config.vocab_size:
      raise UserError(
        f"token ids run from {tokens_bt.min()} to {tokens_bt.max()}, "
        f"the vocabulary from 0 to {self.config.vocab_size - 1}"
      )
    return _logits(self.parameters, Batch(tokens_bt))


@jax.jit
def _logits(model: nnx.Module, batch: Batch):
  return model.logits(model.hidden(batch)[0])
