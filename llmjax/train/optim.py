"""Optimizers and schedules: optax, put together from a config."""

import dataclasses

import jax
import optax

from llmjax.core import tree
from llmjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW under a linear warm-up and a cosine decay.

  Attributes:
    learning_rate: peak, at the end of the warm-up.
    warmup: steps of linear growth from zero.
    final: share of the peak that the cosine ends on, at the last step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, times the learning rate.
    no_decay: path patterns of weights that are not decayed; one that matches nothing is an error.
    clip_norm: largest global gradient norm; 0 clips nothing.
  """

  learning_rate: float = 1e-3
  warmup: int = 100
  final: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: tuple = ("*/scale_d",)
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.learning_rate <= 0 or self.warmup < 0 or self.clip_norm < 0:
      raise UserError(
        f"optim: learning_rate {self.learning_rate} must be positive, warmup {self.warmup} and "
        f"clip_norm {self.clip_norm} not negative"
      )


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Learning rate of each step: up linearly for `warmup`, then down a cosine to the last step."""
  warmup = min(config.warmup, steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=config.learning_rate * config.final,
  )


def make_optimizer(config: OptimConfig, steps: int, model) -> optax.GradientTransformation:
  """Builds clipping and AdamW for a model's tree.

  Args:
    config: see `OptimConfig`.
    steps: length of the run, which the schedule ends on.
    model: the model or its abstract tree; patterns are matched against its paths.
  Returns:
    The optax transformation.
  Raises:
    UserError: a pattern of `no_decay` matches no parameter.
  """
  decayed = jax.tree.map(lambda spared: not spared, tree.select(model, config.no_decay))
  adamw = optax.adamw(
    make_schedule(config, steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, adamw)
