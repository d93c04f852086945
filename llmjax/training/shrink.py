"""Shrinks an experiment by rule, so that `check` takes seconds per mesh on a laptop. Sizes shrink;
kinds of layers, norms, positions, masks, dropout, loss, optimizer, remat and ZeRO stage stay."""

import dataclasses
import math

import numpy as np

from llmjax.data.batch import Batch
from llmjax.data.tasks import Task
from llmjax.nn.moe import MoeConfig
from llmjax.training.config import Config

_HEAD, _BLOCK = 8, 4  # width of a head: even, with channels for every scaling of rope


def shrink(config: Config, devices: int) -> Config:
  """Shrinks an experiment to sizes that meshes of `devices` divide if they divide the config's.

  A mesh that does not divide a size of the config (3 key heads) does not divide the small one.

  Returns:
    The experiment in fp32, of a few layers, with heads 8 wide.
  """
  model, dims = config.model, config.model.dims
  k, group = _few_heads(dims["k"], dims["g"], devices)
  attention = dataclasses.replace(
    model.attention.shrunk(devices, _HEAD), window=min(model.attention.window, devices + 3),
    sparse_block=min(model.attention.sparse_block, 4), block=16,
  )
  small = dataclasses.replace(
    model, moe=_few(model.moe, devices),
    layers=min(model.layers, max(4, len(model.attention.pattern))),
    encoder_layers=min(model.encoder_layers, 2),
    width=8 * math.gcd(model.width, devices) if not model.vision.image_size else model.width,
    heads=k * group, kv_heads=k, head_dim=_HEAD, mlp_width=8 * math.gcd(model.mlp_width, devices),
    vocab_size=32 * devices, max_seq_len=8 * devices, dtype="float32", attention=attention,
    weights=tuple((pattern, _small_blocks(kind)) for pattern, kind in model.weights),
  )
  rows = 2 * devices * config.train.grad_accum_steps
  return dataclasses.replace(
    config, model=small, data=dataclasses.replace(config.data, batch_size=rows),
    eval=dataclasses.replace(config.eval, stride=0),
    loss=dataclasses.replace(config.loss, chunk=min(config.loss.chunk, 4) or 0),
    optim=dataclasses.replace(config.optim, warmup=min(config.optim.warmup, 1)),
  )


def _few_heads(k: int, g: int, devices: int) -> tuple[int, int]:
  """Fewer key heads and queries to each, which the same meshes of `devices` divide or copy."""
  few, n = math.gcd(k, devices), math.gcd(k * g, devices)
  if few < min(k, devices):  # so that it divides no mesh that k does not divide
    few *= next(factor for factor in range(2, k + 1) if k // few % factor == 0)
  groups = [i for i in range(1, g + 1) if g % i == 0 and few * i % n == 0]
  return few, next((i for i in groups if i > 1), 1)


def _small_blocks(kind: dict) -> dict:
  """A row of `model.weights` whose blocks of codes are few enough numbers for any mesh."""
  small = {"block": _BLOCK} if "block" in kind else {}
  base = {"base": _small_blocks(kind["base"])} if kind.get("base") else {}
  return dict(kind) | small | base


def _few(moe: MoeConfig, devices: int) -> MoeConfig:
  """Fewer experts, if routing can still choose `top_k` of them, and narrower ones."""
  if not moe.experts:
    return moe
  experts = math.gcd(moe.experts, 2 * devices)
  if experts % moe.groups or moe.top_k > experts // moe.groups * moe.top_groups:
    experts = moe.experts
  width = 8 * math.gcd(moe.width, devices) if moe.width else 0
  first_k_dense = min(moe.first_k_dense, 1)
  return dataclasses.replace(moe, experts=experts, width=width, first_k_dense=first_k_dense)


def made_up_batch(config: Config) -> Batch:
  """Makes a batch of random tokens for the config's task, packed unevenly.

  Raises:
    UserError: models of this kind do not learn from text.
  """
  known = config.known_task()
  task = Task(known, config.model.vocab_size - Task(known).extra_tokens)
  rng = np.random.default_rng(config.seed)
  rows, length = config.data.batch_size, config.model.max_seq_len + 1
  tokens_bu = rng.integers(0, task.tokens, (rows, length), np.int32)
  ends = np.sort(rng.integers(length // 8, length, (rows, 3)), axis=1)
  positions = np.arange(length)
  segments_bu = sum((positions >= ends[:, i, None]).astype(np.int32) for i in range(2)) + 1
  segments_bu[positions >= ends[:, 2, None]] = 0  # padding, of another length in each row
  return task.batch(tokens_bu, segments_bu, [(config.seed, row) for row in range(rows)])
