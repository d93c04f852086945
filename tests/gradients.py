"""Losses and gradients of language models for tests, by the functions that a step calls."""

import jax.extend
import jax.numpy as jnp

from llmjax.core import tree
from llmjax.training import step
from llmjax.training.losses import LossConfig
from llmjax.training.objective import make_objective
from llmjax.training.optim import make_optimizer
from llmjax.training.parameters import TrainState


def loss_and_grad(model, batch, accumulation=1, loss=None, **more):
  """`training.step.loss_and_grad` of all parameters: (loss, gradients by path, count, routing)."""
  objective = make_objective("language_model", loss or LossConfig(), batch)
  metrics, *rest = step.loss_and_grad(
    model, tree.flatten(model), batch, objective, accumulation, **more
  )
  return metrics["loss"], *rest


def first_step(model, batch, config, optimizer=None):
  """Takes one step of all parameters from fresh state: (state after it, metrics)."""
  optimizer = optimizer or make_optimizer(config.optim, 10, model)
  trainable = tree.flatten(model)
  state = TrainState(jnp.int32(0), trainable, {}, optimizer.init(trainable))
  return step.advance(state, batch, config, optimizer)[:2]


def sizes(jaxpr):
  """Numbers of every array that a jaxpr and all within it make."""
  for sub in jax.extend.core.subjaxprs(jaxpr):
    yield from sizes(sub)
  for equation in jaxpr.eqns:
    yield from (out.aval.size for out in equation.outvars if hasattr(out.aval, "size"))
