"""Optimizers and schedules: optax, put together from a config."""

import dataclasses
import re

import optax

from llmjax.core import tree
from llmjax.core.choices import check_choice, check_texts
from llmjax.core.dims import letters_of
from llmjax.core.errors import UserError

KINDS = ("adamw", "muon")
_VECTORS = re.compile(r"(^|[/_])(scale|bias|sinks)_\w+$")  # added or multiplied, channel by channel


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW or Muon under a linear warm-up and a cosine decay.

  Attributes:
    kind: adamw, or muon: the blocks' matrices by Muon, embeddings, head and scales by AdamW.
    learning_rate: AdamW's peak, at the end of the warm-up.
    matrix_learning_rate: Muon's peak; unused by adamw.
    warmup: steps of linear growth from zero.
    min_lr_ratio: share of the peak that the cosine ends on, at the last step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, times the learning rate.
    no_decay: path patterns of weights that are not decayed, beside scales, biases and sinks, which
      never are; a pattern that matches nothing is an error.
    clip_norm: largest global gradient norm; 0 clips nothing.
    bias_rate: what a router's bias moves by at every step, where it has one (`model.moe.bias`).
  """

  kind: str = "adamw"
  learning_rate: float = 1e-3
  matrix_learning_rate: float = 0.02
  warmup: int = 100
  min_lr_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: tuple = ()
  clip_norm: float = 1.0
  bias_rate: float = 0.001

  def __post_init__(self):
    check_choice("optim.kind", self.kind, KINDS)
    check_texts("optim.no_decay", self.no_decay)
    for key in ("learning_rate", "matrix_learning_rate", "eps"):
      if getattr(self, key) <= 0:
        raise UserError(f"optim.{key} {getattr(self, key)} is not positive")
    for key in ("warmup", "min_lr_ratio", "weight_decay", "clip_norm", "bias_rate"):
      if getattr(self, key) < 0:
        raise UserError(f"optim.{key} {getattr(self, key)} is negative")
    for key in ("beta1", "beta2"):
      if not 0 <= getattr(self, key) < 1:
        raise UserError(f"optim.{key} {getattr(self, key)} is not in [0, 1)")


def make_schedule(config: OptimConfig, steps: int, peak: float) -> optax.Schedule:
  """Learning rate by updates done: up linearly to `peak`, then down a cosine to the last step.

  The run's update number 1 already moves; number `warmup` is at the peak, number `steps` at
  `min_lr_ratio` of it. A run of no more steps than `warmup` ends as it warms up.
  """
  rate = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=config.warmup,
    decay_steps=max(steps, config.warmup + 1),
    end_value=peak * config.min_lr_ratio,
  )
  return lambda done: rate(done + 1)


def make_optimizer(config: OptimConfig, steps: int, model) -> optax.GradientTransformation:
  """Builds clipping and the optimizer for a model's tree.

  Args:
    config: see `OptimConfig`.
    steps: length of the run, which the schedule ends on.
    model: the model or its abstract tree; patterns are matched against its paths.
  Returns:
    The optax transformation.
  Raises:
    UserError: a pattern of `no_decay` matches no parameter.
  Source: AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101; Muon: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon.
  """
  spared = tree.flatten(tree.select(model, config.no_decay))

  # Masks and labels go in as functions of the parameters: a module is itself callable, and optax
  # would take a module-shaped mask for a function.
  def decayed(params):
    return tree.map_with_path(lambda path, _: not (spared[path] or _VECTORS.search(path)), params)

  adamw = optax.adamw(
    make_schedule(config, steps, config.learning_rate),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  rule = adamw
  if config.kind == "muon":
    muon = optax.contrib.muon(
      make_schedule(config, steps, config.matrix_learning_rate),
      weight_decay=config.weight_decay,
      weight_decay_mask=decayed,
      muon_weight_dimension_numbers=lambda params: tree.map_with_path(_sides, params),
    )
    rule = optax.partition({"adamw": adamw, "muon": muon}, _labels)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, rule)


def _labels(params):
  return tree.map_with_path(lambda path, leaf: "muon" if _sides(path, leaf) else "adamw", params)


def _sides(path: str, leaf) -> optax.contrib.MuonDimensionNumbers | None:
  """Says which axes of a weight are a matrix's input and output; None where it is no matrix.

  The residual width `d` (or else a low rank `r`) is one side, all but layers `l` and experts `e`
  the other. Vocabulary tables are rows of vectors, not maps between spaces, and keep AdamW; so do
  tables of positions and types, and what reads pixels.
  """
  letters = letters_of(path, leaf.ndim)
  stacked = "le" if "f" in letters else "l"  # an expert's matrix is one of many
  places = {letter: place for place, letter in enumerate(letters) if letter not in stacked}
  side = "d" if "d" in places else "r"
  if len(places) < 2 or places.keys() & set("vti") or side not in places or _VECTORS.search(path):
    return None
  residual = (places.pop(side),)
  other = tuple(places.values())
  sides = (residual, other) if residual < other else (other, residual)
  return optax.contrib.MuonDimensionNumbers(*sides)
