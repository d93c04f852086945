"""Held-out loss and bits per byte of text, with gzip and xz on the same bytes to compare."""

import functools
import gzip
import itertools
import lzma
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmjax.core.errors import RunFailed
from llmjax.data.batch import Batch
from llmjax.data.loader import place
from llmjax.data.pack import windows
from llmjax.data.prepare import TokenStore
from llmjax.data.sources import Document
from llmjax.data.tasks import Task, score_only
from llmjax.parallel.rules import ACTIVATIONS, axes_of, batch_sharding
from llmjax.training.losses import LossConfig
from llmjax.training.objective import make_objective
from llmjax.training.step import compiler_options


def evaluate_loss(
  model: nnx.Module,
  store: TokenStore,
  mesh: Mesh,
  task: Task | None = None,
  batch_size: int = 16,
  stride: int = 0,
) -> dict:
  """Computes the loss of held-out text in rows of `max_seq_len` tokens.

  Language models predict every token exactly once, in overlapping rows: after a document's first
  row, each prediction has at least max_seq_len - stride tokens before it. Tasks that mask tokens
  mask the same ones each time.

  Args:
    model: the model.
    store: held-out documents; each document's end counts as one more token to predict.
    mesh: its data axes divide the rows.
    task: what is predicted; language modelling by default.
    batch_size: rows of a batch, rounded up to what the mesh divides.
    stride: predictions of each overlapping row; 0 means half of `max_seq_len`.
  Returns:
    `nats_per_token`, `perplexity`, `tokens` (predicted), `bytes`; `bits_per_byte` of a model that
    predicts all of the text.
  Raises:
    RunFailed: the loss is not finite.
  """
  task = task or Task()
  all_tokens = task.config.name in ("language_model", "prefix_lm")
  context = model.config.max_seq_len
  stride = min(stride or max(1, context // 2), context) if all_tokens else context
  shards = math.prod(mesh.shape[axis] for axis in axes_of("b", ACTIVATIONS))
  batch_size = math.ceil(batch_size / shards) * shards
  sharding = batch_sharding(mesh)
  sums, loss_sum = [], _compiled_loss_sum(mesh, task.config.name)
  with jax.set_mesh(mesh):
    for batch in _batches(store, None if all_tokens else task, context, stride, batch_size):
      sums.append(loss_sum(model, place(batch, sharding)))
  totals = [[float(value) for value in pair] for pair in sums]
  for number, (nats, _) in enumerate(totals, 1):
    if not math.isfinite(nats):
      raise RunFailed(f"the held-out loss is {nats} in batch {number} of {len(totals)}")
  nats, tokens = (math.fsum(column) for column in zip(*totals, strict=True))
  scores = {
    "nats_per_token": nats / tokens,
    "perplexity": math.exp(min(nats / tokens, 700)),
    "tokens": int(tokens),
    "bytes": store.size_bytes,
  }
  if all_tokens:
    scores["bits_per_byte"] = nats / math.log(2) / store.size_bytes
  return scores


@functools.cache
def _compiled_loss_sum(mesh: Mesh, task: str):
  """(model, batch) → [sum of the loss, predictions], compiled with training's options."""

  def loss_sum(model: nnx.Module, batch: Batch):
    _, count, metrics = make_objective(task, LossConfig(), batch)(model, batch)
    return jnp.stack((metrics["loss"], count))

  return jax.jit(loss_sum, compiler_options=compiler_options(mesh))


def _batches(store, task: Task | None, context, stride, batch_size):
  numbered = enumerate(windows(store, context, stride))
  while rows := [(number, *row) for number, row in itertools.islice(numbered, batch_size)]:
    rows += [(0, *map(np.zeros_like, rows[0][1:]))] * (batch_size - len(rows))
    yield _batch(task, rows)


def _batch(task: Task | None, rows):
  numbers, *columns = zip(*rows, strict=True)
  tokens_bu, segments_bu, scored_bu = map(np.stack, columns)
  if task is None:
    return score_only(tokens_bu, segments_bu, scored_bu)
  return task.batch(tokens_bu, segments_bu, [(0, number) for number in numbers])


def compressor_bits_per_byte(documents: Sequence[Document]) -> dict:
  """Measures gzip -9 and xz -9 on the documents end to end, as one stream.

  Returns:
    `gzip_bits_per_byte` and `xz_bits_per_byte`.
  """
  data = "".join(document.text for document in documents).encode()
  return {
    "gzip_bits_per_byte": 8 * len(gzip.compress(data, 9)) / len(data),
    "xz_bits_per_byte": 8 * len(lzma.compress(data, preset=9)) / len(data),
  }
