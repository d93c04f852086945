"""Held-out loss and bits per byte of text, with gzip and xz on the same bytes to compare."""

import functools
import gzip
import itertools
import lzma
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmjax.core.errors import RunFailed
from llmjax.core.progress import ProgressLine
from llmjax.data.batch import Batch
from llmjax.data.loader import place
from llmjax.data.pack import window_row, windows
from llmjax.data.prepare import TokenStore
from llmjax.data.sources import Document
from llmjax.data.tasks import Task, score_only
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import forward_flops_per_token
from llmjax.parallel import multihost
from llmjax.parallel.rules import axes_of, batch_sharding
from llmjax.training.losses import LossConfig
from llmjax.training.objective import make_objective
from llmjax.training.step import compiler_options

_UNIT = 128  # positions; kernels want rows in multiples of it
_CPU_POSITIONS = 8192  # of a batch on a CPU: more are no faster there, and show no progress


class RowBatch(NamedTuple):
  """Rows that are computed together.

  Attributes:
    numbers: of windows of the text.
    rows: of the batch; those beyond `numbers` are padding.
    width: positions of each row.
  """

  numbers: list[int]
  rows: int
  width: int

  @property
  def positions(self) -> int:
    """Positions of all rows, padding included."""
    return self.rows * self.width


def evaluate_loss(
  model: nnx.Module,
  store: TokenStore,
  mesh: Mesh,
  task: Task | None = None,
  batch_size: int = 16,
  stride: int = 0,
  show: bool = False,
) -> dict:
  """Computes the loss of held-out text in rows of at most `max_seq_len` positions.

  Language models predict every token exactly once, in overlapping rows: after a document's first
  row, each prediction has at least max_seq_len - stride tokens before it. Tasks that mask tokens
  mask the same ones each time.

  Args:
    model: the model.
    store: held-out documents; each document's end counts as one more token to predict.
    mesh: its data axes divide the rows.
    task: what is predicted; language modelling by default.
    batch_size: most rows of a batch, rounded up to what the mesh divides; on a CPU fewer if
      they are long.
    stride: predictions of each overlapping row; 0 means half of `max_seq_len`.
    show: tell on standard error what there is to compute, then how much of it is done.
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
  rows = list(windows(store.lengths, context, stride))
  shards = math.prod(mesh.shape[axis] for axis in axes_of("b"))
  # What a task hides is drawn for rows as wide as the context.
  unit = _UNIT * mesh.shape["context"] if all_tokens else context
  needs = [row.positions for row in rows]
  if mesh.devices.flat[0].platform == "cpu":
    batch_size = min(batch_size, max(1, _CPU_POSITIONS // max(needs)))
  batches = plan_batches(needs, batch_size, shards, unit, context)
  if show:
    multihost.say(_describe(model.config, store, batches))
  read = functools.lru_cache(maxsize=1)(store.__getitem__)
  sharding, loss_sum = batch_sharding(mesh), _compiled_loss_sum(mesh, task.config.name)

  def start(batch: RowBatch):
    cut = [(n, *window_row(read(rows[n].document), rows[n], batch.width)) for n in batch.numbers]
    cut += [(0, *map(np.zeros_like, cut[0][1:]))] * (batch.rows - len(cut))
    return batch, loss_sum(model, place(_batch(None if all_tokens else task, cut), sharding))

  with jax.set_mesh(mesh):
    nats, tokens = _total(map(start, batches), batches, show and multihost.is_writer())
  scores = {
    "nats_per_token": nats / tokens,
    "perplexity": math.exp(min(nats / tokens, 700)),
    "tokens": int(tokens),
    "bytes": store.size_bytes,
  }
  if all_tokens:
    scores["bits_per_byte"] = nats / math.log(2) / store.size_bytes
  return scores


def plan_batches(
  positions: Sequence[int], batch_size: int, shards: int, unit: int, context: int
) -> list[RowBatch]:
  """Divides rows of different lengths into batches of similar ones, the longest first.

  Batches have equal numbers of rows. A batch is as wide as the one before it or, where half of that
  is enough, as its longest row needs: every further width has to be compiled.

  Args:
    positions: that each row needs.
    batch_size: most rows of a batch.
    shards: number that divides the rows of a batch; `batch_size` is rounded up to it.
    unit: number that divides a width less than the context.
    context: most positions of a row.
  """
  order = sorted(range(len(positions)), key=lambda number: -positions[number])
  count = math.ceil(len(order) / (math.ceil(batch_size / shards) * shards))
  rows = math.ceil(math.ceil(len(order) / count) / shards) * shards
  width, batches = 2 * context, []
  for first in range(0, len(order), rows):
    longest = positions[order[first]]
    if longest <= width / 2:
      width = min(context, math.ceil(longest / unit) * unit)
    batches.append(RowBatch(order[first : first + rows], rows, width))
  return batches


def _describe(config: ModelConfig, store: TokenStore, batches: Sequence[RowBatch]) -> str:
  """Says what there is to compute, one line."""
  positions = sum(batch.positions for batch in batches)
  flops = sum(b.positions * forward_flops_per_token(config, b.width) for b in batches)
  rows = sum(len(batch.numbers) for batch in batches)
  return (
    f"scoring {store.size_bytes:,} bytes, {int(store.lengths.sum()) - len(store):,} tokens "
    f"(documents: {len(store):,}, rows: {rows:,}, batches: {len(batches):,}, "
    f"positions with padding: {positions:,}), {flops:.2g} FLOPs"
  )


def _total(started: Iterator, batches: Sequence[RowBatch], show: bool) -> tuple[float, float]:
  """Adds up (nats, predictions) of batches, waiting for each when two later ones are started."""
  line = ProgressLine(sum(batch.positions for batch in batches), unit="positions") if show else None
  nats = tokens = done = 0
  pending = deque()
  try:
    for number in range(1, len(batches) + 1):
      pending.extend(itertools.islice(started, 3 - len(pending)))
      batch, sums = pending.popleft()
      of_batch, predictions = np.asarray(sums).tolist()
      if not math.isfinite(of_batch):
        raise RunFailed(f"the held-out loss is {of_batch} in batch {number} of {len(batches)}")
      nats, tokens, done = nats + of_batch, tokens + predictions, done + batch.positions
      if line:
        line.update(done, f"{nats / max(1, tokens):.3f} nats per token")
  finally:
    if line:
      line.close()
  return nats, tokens


@functools.cache
def _compiled_loss_sum(mesh: Mesh, task: str):
  """(model, batch) → [sum of the loss, predictions], compiled with training's options."""

  def loss_sum(model: nnx.Module, batch: Batch):
    _, count, metrics = make_objective(task, LossConfig(), batch)(model, batch)
    return jnp.stack((metrics["loss"], count))

  return jax.jit(loss_sum, compiler_options=compiler_options(mesh))


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
