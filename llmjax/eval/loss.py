"""Held-out loss: bits per byte of text, beside what general compressors make of the same bytes."""

import gzip
import lzma
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.data.batch import Batch
from llmjax.data.loader import place
from llmjax.data.pack import windows
from llmjax.data.prepare import TokenStore
from llmjax.data.sources import Document
from llmjax.data.tasks import score_only
from llmjax.models.decoder import Decoder
from llmjax.parallel.rules import batch_sharding
from llmjax.train.losses import cross_entropy


def evaluate_loss(
  decoder: Decoder, store: TokenStore, mesh: Mesh, batch_size: int = 16, stride: int = 0
) -> dict:
  """Predicts every token of a store exactly once, in overlapping rows.

  Past a document's first row, each prediction has at least context - stride tokens before it.

  Args:
    decoder: the model.
    store: held-out documents; each document's end counts as one more token to predict.
    mesh: where rows are spread.
    batch_size: rows at a time, rounded up to what the mesh divides.
    stride: new predictions a row; 0 means half the context.
  Returns:
    `nats_per_token`, `perplexity`, `bits_per_byte`, `tokens`, `bytes`.
  """
  context = decoder.config.context
  stride = min(stride or max(1, context // 2), context)
  ways = mesh.size // mesh.shape["tensor"]
  batch_size = math.ceil(batch_size / ways) * ways
  sharding = batch_sharding(mesh)
  sums = []
  with jax.set_mesh(mesh):
    for batch in _batches(store, context, stride, batch_size):
      sums.append(_loss_sum(decoder, place(batch, sharding)))
  totals = [[float(part) for part in pair] for pair in sums]
  nats, tokens = (math.fsum(column) for column in zip(*totals, strict=True))
  return {
    "nats_per_token": nats / tokens,
    "perplexity": math.exp(min(nats / tokens, 700)),
    "bits_per_byte": nats / math.log(2) / store.size_bytes,
    "tokens": int(tokens),
    "bytes": store.size_bytes,
  }


@jax.jit
def _loss_sum(decoder: Decoder, batch: Batch):
  logits_btv, _ = decoder(batch.tokens_bt, batch.segments_bt, batch.positions_bt)
  return jnp.stack(cross_entropy(logits_btv, batch))


def _batches(store, context, stride, batch_size):
  rows = []
  for row in windows(store, context, stride):
    rows.append(row)
    if len(rows) == batch_size:
      yield score_only(*(np.stack(column) for column in zip(*rows, strict=True)))
      rows = []
  if rows:
    rows += [tuple(np.zeros_like(part) for part in rows[0])] * (batch_size - len(rows))
    yield score_only(*(np.stack(column) for column in zip(*rows, strict=True)))


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
