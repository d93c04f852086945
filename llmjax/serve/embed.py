"""Texts as vectors: the vectors of their tokens pooled, in batches of texts of like lengths."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core.errors import UserError, note
from llmjax.data.batch import Batch
from llmjax.models.inputs import as_list, bucket, check_lengths, is_single, pad_rows
from llmjax.models.model import Model
from llmjax.models.pooling import Pooling, pool
from llmjax.text.tokenizer import affixes, framed

_BATCH = 32  # texts of a batch


def embed(
  model: Model,
  texts: str | Sequence[str],
  pooling: str | None = None,
  normalize: bool | None = None,
  prompt: str | None = None,
) -> np.ndarray:
  """Turns texts into vectors.

  Args:
    model: an encoder or a decoder, with a tokenizer.
    texts: one or several, each with what the tokenizer puts around a text, as [CLS] and [SEP].
    pooling: of `models.pooling.POOLINGS`, as mean, cls or lasttoken; several with + between them
      are concatenated. None: the model's own; where it has none mean, and a note says so.
    normalize: vectors of length one, so that their products are cosines. None: as the model says.
    prompt: stands before every text. None: the model's own, mostly nothing.
  Returns:
    fp32 [texts, d] (d for each pooling), in order; [d] of one text.
  Raises:
    UserError: another kind of model, no tokenizer, an unknown pooling, or a text longer than the
      context or than the model's own limit.
  """
  if model.config.kind not in ("encoder", "decoder"):
    kind = model.config.kind
    raise UserError(f"a model of kind {kind!r} has no text vectors; it takes encoder or decoder")
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer")
  for text in (given := as_list(texts)):
    if not isinstance(text, str):
      raise UserError(f"embed takes texts, not {type(text).__name__}")
  how = _chosen(model, pooling, normalize, prompt)
  rows, skipped = _encode(model, given, how)
  vectors = np.zeros((len(rows), model.config.width * len(how.modes)), np.float32)
  shortest_first = sorted(range(len(rows)), key=lambda number: len(rows[number]))
  for first in range(0, len(rows), _BATCH):
    chosen = shortest_first[first : first + _BATCH]
    padding = [[]] * (bucket(len(chosen), 1) - len(chosen))
    examples = [*(rows[number] for number in chosen), *padding]
    tokens_bt, is_token_bt = pad_rows(examples, model.config.max_seq_len, 1)
    batch = Batch(tokens_bt, segments_bt=is_token_bt.astype(np.int32))
    vectors[chosen] = _pooled(model.parameters, batch, skipped, how.modes)[: len(chosen)]
  if how.normalize:
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
  return vectors[0] if is_single(texts) else vectors


def _chosen(model: Model, pooling, normalize, prompt) -> Pooling:
  """The model's own pooling, changed as the caller asks."""
  how = model.pooling or Pooling()
  if pooling is not None:
    how = dataclasses.replace(how, modes=tuple(pooling.split("+")), refused="")
  elif how.refused:
    raise UserError(f"{how.refused}; give a pooling to have the model's vectors without that")
  elif model.pooling is None:
    note("the model says nothing of pooling: mean is taken")
  wanted = {"normalize": normalize, "prompt": prompt}
  return dataclasses.replace(how, **{k: v for k, v in wanted.items() if v is not None})


def _encode(model: Model, texts: Sequence[str], how: Pooling) -> tuple[list[list[int]], int]:
  """The ids of texts, and how many of their first ones are of a prompt that is not pooled."""
  tokenizer, context, kind = model.tokenizer, model.config.max_seq_len, model.config.kind
  prompted = [(how.prompt + text).lower() if how.lower else how.prompt + text for text in texts]
  rows = [framed(tokenizer, kind, ids) for ids in tokenizer.encode_batch(prompted)]
  check_lengths("text", rows, min(how.longest or context, context), context)
  if how.include_prompt or not how.prompt:
    return rows, 0
  prefix, _ = affixes(tokenizer, kind)
  return rows, len(prefix) + len(tokenizer.encode(how.prompt))


@functools.partial(jax.jit, static_argnames="modes")
def _pooled(model: nnx.Module, batch: Batch, skipped, modes: tuple[str, ...]):
  real_bt = batch.segments_bt > 0
  pooled_bt = jnp.arange(real_bt.shape[1]) >= skipped
  x_btd = model.features(batch)
  return jnp.concatenate([pool(model, x_btd, real_bt, mode, pooled_bt) for mode in modes], axis=1)
