"""Texts as vectors: an encoder's tokens pooled, in batches of texts of like lengths."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.model import Model
from llmjax.serve.prompt import bucket, check_lengths, lay_out
from llmjax.text.tokenizer import framed

_ROWS = 32  # texts a batch


def embed(
  model: Model, texts: Sequence[str], pooling: str = "mean", normalize: bool = True
) -> np.ndarray:
  """Turns texts into vectors.

  Args:
    model: an encoder with a tokenizer.
    texts: each with what the tokenizer puts around a text, as [CLS] and [SEP].
    pooling: mean or max over a text's tokens; first; pooler, BERT's own.
    normalize: vectors of length one, so that their products are cosines.
  Returns:
    fp32 [texts, d], in order.
  Raises:
    UserError: not an encoder, no tokenizer, an unknown pooling, or a text longer than the context.
  Source: mean pooling: Reimers & Gurevych 2019, arXiv:1908.10084, sec. 3.
  """
  if model.config.kind != "encoder":
    raise UserError(f"a model of kind {model.config.kind!r} has no text vectors; it takes encoder")
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer")
  rows = _encode(model, texts)
  made = np.zeros((len(rows), model.config.width), np.float32)
  shortest_first = sorted(range(len(rows)), key=lambda number: len(rows[number]))
  for first in range(0, len(rows), _ROWS):
    chosen = shortest_first[first : first + _ROWS]
    empty = [[]] * (bucket(len(chosen), 1) - len(chosen))
    own = [rows[number] for number in chosen]
    tokens_bt, inside_bt = lay_out([*own, *empty], model.config.context, 1)
    batch = Batch(tokens_bt, segments_bt=inside_bt.astype(np.int32))
    made[chosen] = _pooled(model.parameters, batch, pooling)[: len(chosen)]
  if normalize:
    made /= np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)
  return made


def _encode(model: Model, texts: Sequence[str]) -> list[list[int]]:
  tokenizer, context = model.tokenizer, model.config.context
  rows = [framed(tokenizer, model.config.kind, ids) for ids in tokenizer.encode_batch(list(texts))]
  check_lengths("text", rows, context, context)
  return rows


@functools.partial(jax.jit, static_argnames="pooling")
def _pooled(model: nnx.Module, batch: Batch, pooling: str):
  return model.pool(model.features(batch), batch.segments_bt, pooling)
