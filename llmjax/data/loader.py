"""The loader: step number → global batch, of which each process makes the rows its devices hold.

Batch content is a function of (seed, step), whatever the number of processes."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.data import sources
from llmjax.data.batch import Batch
from llmjax.data.pack import PackedRows
from llmjax.data.prepare import TokenStore, prepare
from llmjax.data.tasks import Task
from llmjax.data.text_files import JSON_LINES, is_json_lines
from llmjax.parallel import multihost
from llmjax.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

READ_AHEAD = 8  # batches made in advance


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on.

  Attributes:
    sources: comma-separated `stdlib`, folders and files.
    text_field: the field of a JSON Lines record (`.jsonl`) that is its text.
    not_text: what becomes of files in a folder that are not UTF-8 text: skip, refuse.
    held_out: share of the text that is kept for evaluation, in (0, 1).
    batch_size: rows of the global batch, over all hosts.
    cache: folder for tokenized text; empty means `data/` in the workdir.
  """

  sources: str = "stdlib"
  text_field: str = "text"
  not_text: str = "skip"
  held_out: float = 0.05
  batch_size: int = 16
  cache: str = ""

  def __post_init__(self):
    if not 0 < self.held_out < 1:
      raise UserError(f"data.held_out {self.held_out} is not between 0 and 1")
    check_fields("data", self, not_text=("skip", "refuse"), batch_size=1)


def read_all(config: DataConfig) -> list[sources.Document]:
  """Reads all of the config's text."""
  return sources.read_sources(config.sources, config.text_field, config.not_text)


def read_split(config: DataConfig) -> tuple[list[sources.Document], list[sources.Document]]:
  """Reads the config's text and divides it into training and held-out documents.

  Raises:
    UserError: what `read_sources` and `split` raise, or no file has the field that is asked for.
  """
  documents = read_all(config)
  files = (document.path.rpartition(":")[0] for document in documents)
  if config.text_field != DataConfig.text_field and not any(map(is_json_lines, files)):
    raise UserError(
      f"data.text_field={config.text_field} changes nothing: no file in {config.sources!r} is JSON "
      f"Lines ({', '.join(JSON_LINES)})"
    )
  return sources.split(documents, config.held_out)


def make_tokenizer(config: TokenizerConfig, documents: list[sources.Document]) -> Tokenizer:
  """Trains (or reads) the tokenizer, on at most `train_bytes` spread evenly over the documents."""
  total = sum(document.size_bytes for document in documents)
  keep = min(1.0, config.train_bytes / total)
  texts = (document.text[: int(len(document.text) * keep)] for document in documents)
  return train_tokenizer(config, texts)


def make_store(config: DataConfig, documents, tokenizer: Tokenizer, workdir: Path) -> TokenStore:
  """Tokenizes documents into the config's cache, or finds them there, as all but one process do."""
  cache = Path(config.cache or Path(workdir, "data"))
  stores = []
  multihost.from_writer(lambda: stores.append(prepare(documents, tokenizer, cache)))
  return stores[0] if stores else prepare(documents, tokenizer, cache)


def read_rows(rows: PackedRows, task: Task, numbers: Sequence[int], seed: int) -> Batch:
  """Makes a numpy batch of packed rows by their numbers, counted through the whole run."""
  tokens_bu, segments_bu = map(np.stack, zip(*(rows[number] for number in numbers), strict=True))
  return task.batch(tokens_bu, segments_bu, [(seed, number) for number in numbers])


def batches(
  rows: PackedRows,
  task: Task,
  sharding: NamedSharding,
  batch_size: int,
  start: int,
  stop: int,
  seed: int = 0,
  read_ahead: int = READ_AHEAD,
) -> Iterator[Batch]:
  """Yields the global batches of steps `start` to `stop - 1`, placed on the devices.

  Args:
    sharding: where [b, t] arrays live.
    batch_size: rows of the global batch.
    seed: with step and row, decides what the task draws.
    read_ahead: batches made in advance, on threads.
  """
  local = local_rows(sharding, batch_size)

  def local_batch(step) -> Batch:
    return read_rows(rows, task, [int(step) * batch_size + row for row in local], seed)

  # Indices are steps, so Grain's own state is one number that we already know.
  steps = grain.MapDataset.range(start, stop).map(local_batch)
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=read_ahead)
  for batch in steps.to_iter_dataset(options):
    yield place(batch, sharding, local, batch_size)


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
  """Lists the rows of a global batch that this process's devices hold."""
  indices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
  return sorted({row for index in indices for row in range(*index[0].indices(batch_size))})


def place(batch: Batch, sharding: NamedSharding, rows=None, batch_size: int | None = None) -> Batch:
  """Puts the numpy rows that this process made on its devices, as a global batch.

  Args:
    sharding: where [b, t] arrays live.
    rows: their numbers in the global batch; by default they are all of it.
    batch_size: rows of the global batch.
  """
  batch_size = batch_size or len(jax.tree.leaves(batch)[0])
  local = {row: i for i, row in enumerate(range(batch_size) if rows is None else rows)}

  def put(array):
    def shard(index):
      return array[([local[row] for row in range(*index[0].indices(batch_size))], *index[1:])]

    return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

  return jax.tree.map(put, batch)
