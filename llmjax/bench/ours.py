"""llmjax as a competitor, through the functions that a run and a user call.

Training and decoding; tokenizing, and packing with batching, as competitors of the training step;
kernels of attention as competitors of each other.
"""

import dataclasses
import functools
import itertools
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import run
from llmjax.bench.sizes import (
  ADAMW,
  NEW_TOKENS,
  NORM_EPS,
  PROMPT_TOKENS,
  ROPE_THETA,
  SIZES,
  Size,
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
from llmjax.models.build import abstract, build
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import MaskSpec, self_mask
from llmjax.nn.attention.scores import Scores
from llmjax.nn.moe import MoeConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from llmjax.training.config import Config
from llmjax.training.losses import LossConfig
from llmjax.training.optim import OptimConfig
from llmjax.training.optimizers import started_from
from llmjax.training.parameters import init_sharded, split
from llmjax.training.step import compile_step

tune_allocator()  # as `import llmjax` does: a worker's own `llmjax` is the bare folder


def make_config(size: Size, dtype: str, overrides=()) -> Config:
  """Makes the experiment of a size: unrolled layers, AdamW at a constant rate, no clipping.

  Raises:
    UserError: an override is wrong.
  """
  beta1, beta2 = ADAMW["betas"]
  config = Config(
    model=ModelConfig(
      layers=size.layers, width=size.width, heads=size.heads, mlp_width=size.mlp_width,
      vocab_size=size.vocab_size, max_seq_len=size.length, tie_embeddings=False, dtype=dtype,
      scan=False, norm=NormConfig(eps=NORM_EPS), position=PositionConfig(theta=ROPE_THETA),
      moe=MoeConfig(experts=size.experts),
    ),
    data=loader.DataConfig(batch_size=size.batch_size),
    loss=LossConfig(moe_aux=0.0),
    optim=OptimConfig(
      learning_rate=ADAMW["lr"], warmup=0, min_lr_ratio=1.0, beta1=beta1, beta2=beta2,
      eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"], clip_norm=0.0,
    ),
  )
  return override(config, overrides)


def write_weights(size: Size, folder: Path) -> None:
  """Writes a Hugging Face folder of random fp32 weights, a Llama or a Mixtral, for all peers."""
  config = make_config(size, "float32").model
  config = dataclasses.replace(config, max_seq_len=max(size.length, PROMPT_TOKENS + NEW_TOKENS))
  weights = jax.jit(lambda key: build(key, config))(jax.random.key(0))
  hf.save_folder(Model(config, weights), folder, family="mixtral" if size.experts else "llama")


def _loaded(spec: Spec, config) -> Model:
  """The weights of the folder under another config of the same architecture."""
  leaves = jax.tree.leaves(run.load(spec.folder).parameters)
  return Model(config, jax.tree.structure(abstract(config)).unflatten(leaves))


def train(spec: Spec):
  """Prepares the whole training step of a run."""
  size = SIZES[spec.size]
  config = make_config(size, spec.dtype, spec.overrides)
  mesh = make_mesh(config.mesh)
  state = init_sharded(config, mesh)
  trainable, _ = split(_loaded(spec, config.model).parameters, config.optim.groups)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
  trainable = jax.device_put(trainable, shardings)
  optimizer = started_from(state.optimizer, trainable)
  state = dataclasses.replace(state, trainable=trainable, optimizer=optimizer)
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
  config = make_config(size, spec.dtype, spec.overrides).model
  model = _loaded(spec, dataclasses.replace(config, max_seq_len=max(config.max_seq_len, 256)))

  def write(rows, new_tokens: int) -> list[list[int]]:
    return generate_ids(model, rows, Sampling(temperature=0.0, max_tokens=new_tokens))

  return prepare_decode(size, write)


def _text(spec: Spec):
  """(config, documents of the standard library, a tokenizer of the size's vocabulary)."""
  vocab_size = max(SIZES[spec.size].vocab_size, 512)  # 256 bytes and the text's characters
  ours = f"--config.tokenizer.vocab_size={vocab_size}", "--config.tokenizer.train_bytes=2000000"
  config = make_config(SIZES[spec.size], spec.dtype, (*ours, *spec.overrides))
  documents, _ = loader.read_split(config.data)
  return config, documents, loader.make_tokenizer(config.tokenizer, documents)


def tokenize(spec: Spec):
  """Prepares `encode_batch` on the text of the standard library, 64 documents a step."""
  _, documents, tokenizer = _text(spec)
  texts = [document.text for document in documents]
  parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
  tokens = sum(len(row) for part in parts for row in tokenizer.encode_batch(part))
  feed = itertools.cycle(parts)
  run_step = lambda: tokenizer.encode_batch(next(feed)) and None  # noqa: E731
  return {}, lambda request: timed_steps(run_step, tokens / len(parts), request["seconds"])


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


def _attention(spec: Spec, kernel: str):
  """Prepares the gradient of causal attention by a kernel, of as many positions as are asked for.

  Memory is what XLA allocates for temporaries, so it is known for lengths that are too long to run.
  """

  def loss(arrays):
    q_btnh, k_bskh, v_bskh = arrays
    mask = self_mask(MaskSpec(), None, jnp.arange(q_btnh.shape[1])[None])
    o_btnh = attend(q_btnh, k_bskh, v_bskh, mask, Scores(q_btnh.shape[-1] ** -0.5), kernel)
    return jnp.sum(jnp.square(o_btnh.astype(jnp.float32)))

  @functools.cache
  def prepare(positions: int) -> tuple:
    keys, shape = jax.random.split(jax.random.key(0), 3), (1, positions, 2, 64)
    arrays = [jax.random.normal(key, shape, jnp.dtype(spec.dtype)) for key in keys]
    compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
    run_step = lambda: jax.block_until_ready(compiled(arrays)) and None  # noqa: E731
    return compiled.memory_analysis().temp_size_in_bytes, run_step

  def measure(request: dict) -> dict:
    temp_bytes, run_step = prepare(request["positions"])
    if temp_bytes > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
      return {"temp_bytes": temp_bytes}
    return {"temp_bytes": temp_bytes} | timed_steps(
      run_step, request["positions"], request["seconds"]
    )

  return {}, measure


attention_direct = functools.partial(_attention, kernel="direct")
attention_blockwise = functools.partial(_attention, kernel="blockwise")
