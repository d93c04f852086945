"""llmjax as a competitor, through the functions a run and a user call.

Training and decoding; and the data side, tokenizing, and packing with batching, as competitors of
the training step.
"""

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from llmjax import run
from llmjax.bench.sizes import (
  ADAMW,
  SIZES,
  hf_config,
  prepare_decode,
  prepare_steps,
  timed_steps,
  token_batches,
)
from llmjax.bench.workers import Spec
from llmjax.core.config import override
from llmjax.core.memory import give_back, settle, tune_allocator
from llmjax.data import loader
from llmjax.data.pack import PackedRows
from llmjax.data.tasks import language_model
from llmjax.formats.hf import folder as hf
from llmjax.models.build import abstract
from llmjax.models.model import Model
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from llmjax.training.config import Config
from llmjax.training.losses import LossConfig
from llmjax.training.optim import OptimConfig
from llmjax.training.parameters import init_sharded, split
from llmjax.training.step import compile_step

tune_allocator()  # as `import llmjax` does: a worker's own `llmjax` is the bare folder


def make_config(size: str, dtype: str, overrides=()) -> Config:
  """Makes the experiment of a size: unrolled layers, AdamW at a constant rate, no clipping.

  Raises:
    UserError: an override is wrong.
  """
  wanted = SIZES[size]
  theirs = hf_config(wanted)
  model = hf.read_config(hf.family_of(theirs), theirs)
  beta1, beta2 = ADAMW["betas"]
  config = Config(
    model=dataclasses.replace(model, max_seq_len=wanted.length, dtype=dtype, scan=False),
    data=loader.DataConfig(batch_size=wanted.batch_size),
    loss=LossConfig(moe_aux=0.0),
    optim=OptimConfig(
      learning_rate=ADAMW["lr"], warmup=0, min_lr_ratio=1.0, beta1=beta1, beta2=beta2,
      eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"], clip_norm=0.0,
    ),
  )
  return override(config, overrides)


def _loaded(spec: Spec, config) -> Model:
  """The weights of the folder under another config of the same architecture."""
  leaves = jax.tree.leaves(run.load(spec.folder).parameters)
  return Model(config, jax.tree.structure(abstract(config)).unflatten(leaves))


def train(spec: Spec):
  """Prepares the whole training step of a run."""
  size = SIZES[spec.size]
  config = make_config(spec.size, spec.dtype, spec.overrides)
  mesh = make_mesh(config.mesh)
  state = init_sharded(config, mesh)
  trainable, _ = split(_loaded(spec, config.model).parameters, config.optim.groups)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
  state = dataclasses.replace(state, trainable=jax.device_put(trainable, shardings))
  step = compile_step(config, mesh)
  feed = itertools.cycle(
    loader.place(language_model(rows, np.ones_like(rows)), batch_sharding(mesh))
    for rows in token_batches(size)
  )

  def run_step() -> float:
    nonlocal state
    state, metrics = step(state, next(feed))
    settle(state)  # as `train.loop.fit` does
    return float(metrics["loss"])

  jax.set_mesh(mesh)  # for good: this process does nothing else
  prepared = prepare_steps(size, run_step)
  give_back()  # as `fit` does after its first step
  return prepared


def decode(spec: Spec):
  """Prepares greedy decoding."""
  size = SIZES[spec.size]
  config = make_config(spec.size, spec.dtype, spec.overrides).model
  model = _loaded(spec, dataclasses.replace(config, max_seq_len=max(config.max_seq_len, 256)))

  def write(rows, new_tokens: int) -> list[list[int]]:
    return generate_ids(model, rows, Sampling(temperature=0.0, max_tokens=new_tokens))

  return prepare_decode(size, write)


def _text(spec: Spec):
  """(config, documents of the standard library, a tokenizer of the size's vocabulary)."""
  vocab_size = max(SIZES[spec.size].vocab_size, 512)  # 256 bytes and the text's characters
  ours = f"--config.tokenizer.vocab_size={vocab_size}", "--config.tokenizer.train_bytes=2000000"
  config = make_config(spec.size, spec.dtype, (*ours, *spec.overrides))
  documents, _ = loader.read_split(config.data)
  return config, documents, loader.make_tokenizer(config.tokenizer, documents)


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
  store = loader.make_store(config.data, documents, tokenizer, Path(folder.name))
  rows = PackedRows(store, config.model.max_seq_len, config.seed)
  sharding = batch_sharding(make_mesh(config.mesh))
  size = config.data.batch_size
  feed = loader.batches(rows, config.task_of(tokenizer), sharding, size, 0, 1 << 40)

  def run_step() -> None:
    jax.block_until_ready(next(feed))

  def measure(request: dict) -> dict:
    for _ in range(loader.READ_AHEAD + 2):  # what was made while another one computed
      next(feed)
    return timed_steps(run_step, size * config.model.max_seq_len, request["seconds"])

  run_step()
  measure.folder = folder  # lives as long as what reads from it
  return {}, measure
