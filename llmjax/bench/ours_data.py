"""The data side as competitors of the training step: tokenizing, and packing with batching."""

import itertools
import tempfile
import time
from pathlib import Path

import jax

from llmjax.bench.ours import make_config
from llmjax.bench.peers import Spec
from llmjax.bench.sizes import SIZES
from llmjax.data.loader import batches, make_store, make_tokenizer, read_split
from llmjax.data.pack import PackedRows
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding


def _text(spec: Spec):
  """(config, documents of the standard library, a tokenizer of the size's vocabulary)."""
  vocab_size = max(SIZES[spec.size].vocab_size, 512)  # 256 bytes and the text's characters
  tokenizer = (f"vocab_size={vocab_size}", "train_bytes=2000000")
  ours = tuple(f"--config.tokenizer.{value}" for value in tokenizer)
  config = make_config(spec.size, spec.dtype, (*ours, *spec.overrides))
  documents, _ = read_split(config.data)
  return config, documents, make_tokenizer(config.tokenizer, documents)


def tokenize(spec: Spec):
  """Prepares `encode_batch` on the text of the standard library."""
  _, documents, tokenizer = _text(spec)
  texts = [document.text for document in documents]
  parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]

  def measure(request: dict) -> dict:
    done, sizes, began_s = 0, 0, time.perf_counter()
    for part in itertools.cycle(parts):
      done += sum(map(len, tokenizer.encode_batch(part)))
      sizes += sum(map(len, part))
      spent_s = time.perf_counter() - began_s
      if spent_s > request["seconds"]:
        break
    rates = {"tokens_per_s": done / spent_s, "characters_per_s": sizes / spent_s}
    return {"tokens": done, "seconds": spent_s, **rates}

  measure({"seconds": 0})
  return {}, measure


def load(spec: Spec):
  """Prepares packing, batching and placing, from tokens on disk to global arrays."""
  config, documents, tokenizer = _text(spec)
  folder = tempfile.TemporaryDirectory()
  store = make_store(config.data, documents, tokenizer, Path(folder.name))
  rows = PackedRows(store, config.model.context, config.seed)
  sharding = batch_sharding(make_mesh(config.mesh))
  size = config.data.batch_size
  feed = batches(rows, config.task_of(tokenizer), sharding, size, 0, 1 << 40)
  jax.block_until_ready(next(feed))

  def measure(request: dict) -> dict:
    for _ in range(config.data.read_ahead + 2):  # what was made while another one computed
      next(feed)
    done, began_s = 0, time.perf_counter()
    while time.perf_counter() < began_s + request["seconds"]:
      jax.block_until_ready(next(feed))
      done += size * config.model.context
    spent_s = time.perf_counter() - began_s
    return {"tokens": done, "seconds": spent_s, "tokens_per_s": done / spent_s}

  measure.folder = folder  # lives as long as what reads from it
  return {}, measure
