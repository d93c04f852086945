"""Whether a config can run on a mesh, checked before any text is read. `train`, `launch`, `plan`
and `check` start here, so that all refuse the same in the same words."""

import contextlib
import dataclasses
import math
import operator

import jax
from jax.sharding import AbstractMesh, Mesh

from llmjax.core.errors import UserError
from llmjax.data.tasks import Task, marks_of
from llmjax.models.build import abstract
from llmjax.nn.attention.context import check_heads
from llmjax.parallel import rules
from llmjax.text.tokenizer import Tokenizer, train_tokenizer
from llmjax.training.config import Config
from llmjax.training.parameters import optimizer_of
from llmjax.training.pipelined import check_stages
from llmjax.training.schedules import check_schedule
from llmjax.training.shrink import made_up_batch

_OF_AXIS = (
  ("stage", "pipeline.schedule"), ("stage", "pipeline.chunks"), ("fsdp", "train.zero_stage"),
  ("fsdp", "train.grad_reduce_dtype"), ("context", "model.attention.context_parallel"),
)
_PLATFORM_KERNELS = ("splash", "cudnn")


def check_run(config: Config, mesh: Mesh | AbstractMesh) -> Config:
  """Refuses a config that cannot run on a mesh.

  Args:
    mesh: its mesh, which may be abstract (`abstract_mesh`).
  Returns:
    The config with `model.vocab_size` filled in.
  Raises:
    UserError: what is wrong, in one sentence.
  """
  config = check_config(config)
  for axis, key, default in unread():
    value = operator.attrgetter(key)(config)
    if mesh.shape[axis] == 1 and value != default:
      raise UserError(f"{key}={value} changes nothing on a mesh of {axis} 1")
  check_mesh(config, mesh)
  return config


def unread() -> list[tuple]:
  """Lists (axis, key, default) of keys that only a mesh reads whose axis is above 1."""
  return [(axis, key, operator.attrgetter(key)(Config())) for axis, key in _OF_AXIS]


def check_config(config: Config) -> Config:
  """Refuses what cannot run on any mesh; returns the config with `model.vocab_size` filled in.

  Raises:
    UserError: no task for this kind of model, a vocabulary that is not the tokenizer's, groups of
      the optimizer that do not fit the model, a schedule that is longer than the run.
  """
  config.known_task()
  config = with_vocab(config)
  check_schedule(config.optim, config.train.steps)
  optimizer_of(config)
  return config


def with_vocab(config: Config, tokenizer: Tokenizer | None = None) -> Config:
  """Fills `model.vocab_size` in from tokenizer and task, or checks it.

  Args:
    config: the experiment. A `model.vocab_size` larger than needed stays, as in published models.
    tokenizer: the run's; by default that of the config. If that is read from a file, a
      `model.vocab_size` above 0 is not checked.
  Raises:
    UserError: `model.vocab_size` is too small; no tokenizer where `tokenizer.path` says.
  """
  wanted, size, known = config.tokenizer, config.model.vocab_size, config.known_task()
  if not tokenizer and wanted.path and size:
    return config
  if not tokenizer and (wanted.path or wanted.kind == "bytes"):
    tokenizer = train_tokenizer(wanted, ())
  if tokenizer:
    least = tokenizer.vocab_size
    least += Task(known, least, marks=marks_of(known.name, tokenizer)).extra_tokens
  else:  # of the kinds that are trained here only WordPiece has a mask token
    masks = known.name == "masked_lm" and wanted.kind == "wordpiece"
    least = wanted.vocab_size + (0 if masks else Task(known).extra_tokens)
  if 0 < size < least:
    raise UserError(
      f"model.vocab_size {size} is less than the {least} of tokenizer and task; leave it at 0"
    )
  model = dataclasses.replace(config.model, vocab_size=size or least)
  return dataclasses.replace(config, model=model)


def check_mesh(config: Config, mesh: Mesh | AbstractMesh):
  """Refuses a mesh that cannot run a config.

  Args:
    mesh: the mesh, which may be abstract.
  Raises:
    UserError: rows, positions, heads, layers or weights that the mesh does not divide.
    LayoutError: the sharding rules do not use an axis of the mesh.
  """
  examples, steps = config.data.batch_size, config.train.grad_accum_steps
  if examples % steps:
    raise UserError(
      f"data.batch_size {examples} is not a multiple of train.grad_accum_steps {steps}"
    )
  rules.check_divides(mesh, "micro-batch", "b", (examples // steps,))
  rules.check_divides(mesh, "row", "t", (config.model.max_seq_len,))
  if config.model.kind == "encoder_decoder":
    width = Task(config.known_task()).target_width(config.model.max_seq_len)
    rules.check_divides(mesh, "row of targets", "t", (width,))
  weights, table = abstract(config.model), rules.ZERO[config.train.zero_stage]
  rules.weight_shardings(mesh, weights)
  rules.check_layout(mesh, weights, table)
  if mesh.shape["stage"] > 1:
    check_stages(config.model.kind, mesh.shape["stage"], steps, config.pipeline)
  if mesh.shape["context"] > 1 and config.model.attention.context_parallel == "all_to_all":
    check_heads(config.model.heads, mesh.shape["tensor"] * mesh.shape["context"])
  if config.model.attention.kernel in _PLATFORM_KERNELS:
    _trace(config, mesh, weights)


def _trace(config: Config, mesh: Mesh | AbstractMesh, weights):
  """Traces the forward pass on a mesh, where a platform's kernel says what it cannot do. That its
  library is missing, as cuDNN's may be, refuses nothing."""
  examples = math.prod(mesh.shape[axis] for axis in rules.axes_of("b"))
  few = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=examples))
  batch = jax.eval_shape(lambda: made_up_batch(few))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), contextlib.suppress(RuntimeError):
    jax.eval_shape(lambda model, batch: model.hidden(batch)[0], weights, batch)
