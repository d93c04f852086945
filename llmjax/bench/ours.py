"""llmjax as a competitor, through the functions a run and a user call."""

import dataclasses
import itertools

import jax
import numpy as np

from llmjax.bench.peers import Spec
from llmjax.bench.sizes import (
  BETAS,
  EPS,
  LEARNING_RATE,
  SIZES,
  WEIGHT_DECAY,
  token_batches,
)
from llmjax.bench.timing import prepare_decode, timed_steps
from llmjax.core.config import override
from llmjax.core.memory import give_back, settle, tune_allocator
from llmjax.data.loader import place
from llmjax.data.tasks import language_model
from llmjax.models.build import abstract
from llmjax.models.model import Model
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.run import load
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from llmjax.train.config import Config
from llmjax.train.state import init_sharded
from llmjax.train.step import compile_step

tune_allocator()  # as `import llmjax` does: a worker's own `llmjax` is the bare folder


def make_config(size: str, dtype: str, overrides=()) -> Config:
  """Makes the experiment of a size: unrolled layers, AdamW at a constant rate, no clipping.

  Raises:
    UserError: an override is wrong.
  """
  wanted = SIZES[size]
  sections = {
    "model.layers": wanted.layers,
    "model.width": wanted.width,
    "model.heads": wanted.heads,
    "model.kv_heads": wanted.heads,
    "model.mlp_width": wanted.mlp_width,
    "model.vocab_size": wanted.vocab_size,
    "model.context": wanted.length,
    "model.tie_embeddings": False,
    "model.dtype": dtype,
    "model.scan": False,
    "data.batch_size": wanted.batch_size,
    "optim.learning_rate": LEARNING_RATE,
    "optim.warmup": 0,
    "optim.final": 1.0,
    "optim.beta1": BETAS[0],
    "optim.beta2": BETAS[1],
    "optim.eps": EPS,
    "optim.weight_decay": WEIGHT_DECAY,
    "optim.clip_norm": 0.0,
  }
  if wanted.experts:
    sections |= {"model.moe.experts": wanted.experts, "loss.balance": 0.0}
  ours = [f"--config.{key}={value}" for key, value in sections.items()]
  return override(Config(), [*ours, *overrides])


def _loaded(spec: Spec, config) -> Model:
  """The weights of the folder under another config of the same architecture."""
  leaves = jax.tree.leaves(load(spec.folder).parameters)
  decoder = jax.tree.unflatten(jax.tree.structure(abstract(config)), leaves)
  return Model(config, decoder)


def train(spec: Spec):
  """Prepares the whole training step of a run."""
  config = make_config(spec.size, spec.dtype, spec.overrides)
  mesh = make_mesh(config.mesh)
  state = init_sharded(config, mesh)
  weights = _loaded(spec, config.model).parameters
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state.model)
  state = dataclasses.replace(state, model=jax.device_put(weights, shardings))
  step = compile_step(config, mesh)
  feed = itertools.cycle(
    place(language_model(rows, np.ones_like(rows)), batch_sharding(mesh))
    for rows in token_batches(SIZES[spec.size])
  )

  def run_step() -> float:
    nonlocal state
    state, metrics = step(state, next(feed))
    settle(state)  # as `train.loop.fit` does
    return float(metrics["loss"])

  with jax.set_mesh(mesh):
    first_loss = run_step()
  give_back()  # likewise
  tokens = config.data.batch_size * config.model.context

  def measure(request: dict) -> dict:
    with jax.set_mesh(mesh):
      return timed_steps(run_step, tokens, request["seconds"])

  return {"first_loss": first_loss}, measure


def decode(spec: Spec):
  """Prepares greedy decoding."""
  size = SIZES[spec.size]
  config = make_config(spec.size, spec.dtype, spec.overrides).model
  config = dataclasses.replace(config, context=max(config.context, 256))
  model = _loaded(spec, config)

  def run(rows, new_tokens: int) -> list[list[int]]:
    return generate_ids(model, rows, Sampling(temperature=0.0, max_tokens=new_tokens))

  return prepare_decode(size, run)
