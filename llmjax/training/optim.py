"""The optimizer of a run: rows of a config that cover all parameters, each with optimizer, rate and
decay."""

import dataclasses
import fnmatch

import optax

from llmjax.core import tree
from llmjax.core.choices import check_choice, check_fields, check_finite
from llmjax.core.config import Options
from llmjax.core.errors import UserError, nearest
from llmjax.core.weight import fixed_paths
from llmjax.nn.param import roles
from llmjax.training.optimizers import check_kind, make_rule
from llmjax.training.schedules import make_schedule, parse_schedule

_OPTIONS = ("rate", "decay", "kind")
_NOT_DECAYED = ("scale", "bias", "router_bias")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer of every parameter, and its learning rate.

  Attributes:
    kind: adamw; adam, which is never decayed; sgd with momentum; adafactor; lion; muon, which
      updates matrices by Muon and all other parameters by AdamW; schedule_free (AdamW).
    learning_rate: peak at the end of the warm-up; of Adafactor relative to a parameter's size.
    matrix_learning_rate: Muon's peak; unused by other kinds.
    schedule: after the warm-up: cosine, linear, constant, inverse_sqrt or wsd, with options such as
      wsd:decay=0.1,shape=linear; see docs/optim.md.
    warmup: steps of linear growth from zero; below 1 a fraction of the run's.
    min_lr_ratio: share of the peak that cosine, linear and wsd end on, at the last step.
    beta1: decay of Adam's first moment, of SGD's momentum, of Lion's update; schedule-free's share
      of the average in the weights that gradients are taken at.
    beta2: decay of Adam's second moment, of Lion's momentum.
    eps: added to the root of Adam's second moment.
    weight_decay: decoupled, times the learning rate; scales and biases are not decayed.
    groups: rows (pattern, {"rate": …, "decay": …, "kind": …}) or (pattern, None). The first row
      whose pattern matches a parameter's path decides: rate is a factor on the learning rate (1),
      decay replaces `weight_decay`, for scales and biases too, kind replaces `kind`; None freezes.
      A pattern that matches nothing and a parameter that no row matches are errors.
    clip_norm: largest global norm of the gradient; 0 clips nothing.
    bias_rate: what a router's bias moves by at every step, where it has one (`model.moe.bias`).
  """

  kind: str = "adamw"
  learning_rate: float = 1e-3
  matrix_learning_rate: float = 0.02
  schedule: str = "cosine"
  warmup: float = 100.0
  min_lr_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  groups: tuple = (("*", {}),)
  clip_norm: float = 1.0
  bias_rate: float = 0.001

  def __post_init__(self):
    object.__setattr__(self, "groups", tuple(map(_checked_row, self.groups)))
    check_kind("optim.kind", self.kind)
    check_fields(
      "optim", self, learning_rate="positive", matrix_learning_rate="positive",
      eps="positive", warmup=0, min_lr_ratio=0, weight_decay=0, clip_norm=0, bias_rate=0,
      beta1="[0, 1)", beta2="[0, 1)",
    )
    if self.warmup >= 1 and self.warmup % 1:
      raise UserError(f"optim.warmup {self.warmup} is neither a number of steps nor a fraction")
    name, _ = parse_schedule(self.schedule)
    if "schedule_free" in (self.kind, *(row.get("kind") for _, row in self.groups if row)):
      if name != "constant":
        raise UserError(f"kind 'schedule_free' needs optim.schedule constant, not {name}")
      if not self.beta1:
        raise UserError("kind 'schedule_free' needs an optim.beta1 above 0")


def _checked_row(row) -> tuple:
  """A row of `optim.groups`, hashable, and the same whether from Python or from a file."""
  if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], str)
          and isinstance(row[1], (dict, type(None)))):
    raise UserError(f"optim.groups holds {row!r}, not (pattern, {{option: value}} or None)")
  pattern, options = row
  if options is None:
    return pattern, None
  options, where = Options(options), f"optim.groups, pattern {pattern!r}:"
  for key, value in options.items():
    check_choice(f"{where} option", key, _OPTIONS)
    if key == "kind":
      check_kind(f"{where} kind", value)
    elif (key, value) != ("decay", None):
      check_finite(f"{where} {key}", value)
      is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if not is_number or value < 0 or (key == "rate" and not value):
        bound = "positive" if key == "rate" else "at least 0"
        raise UserError(f"{where} {key} {value!r} is not {bound}")
      options[key] = float(value)
  return pattern, options


def assign(groups, model) -> dict[str, Options | None]:
  """Finds the row of `optim.groups` that each parameter is trained by; None where it is frozen.

  Returns:
    Options by path, for every parameter; None too for what weight kinds never train: codes,
    scales, masks and the base of a LoRA.
  Raises:
    UserError: a pattern without a parameter or with none that its weight kind trains, a parameter
      without a row, or no parameter that is trained.
  """
  leaves, found, fixed = tree.flatten(model), {}, fixed_paths(model)
  for pattern, options, taken in tree.first_matches("optim.groups", groups, leaves, "parameters"):
    if options is not None and fixed.issuperset(taken):
      raise UserError(
        f"optim.groups: pattern {pattern!r} matches only what its weight kind never trains, "
        f"such as {taken[0]!r}"
      )
    found |= dict.fromkeys(taken, options)
  for path in leaves:
    if path not in found:
      near = nearest(path, [pattern for pattern, _ in groups])
      raise UserError(f"no row of optim.groups matches parameter {path!r}; {near}")
  found |= dict.fromkeys(fixed)
  if not any(options is not None for options in found.values()):
    raise UserError("optim.groups freezes all parameters, so there is nothing to train")
  return {path: found[path] for path in leaves}


def make_optimizer(
  config: OptimConfig, steps: int, model, role: dict[str, str] | None = None
) -> optax.GradientTransformation:
  """Builds clipping and the optimizer of a model's trainable parameters, a dict by path.

  Args:
    steps: length of the run, which the schedule ends on.
    model: the model or its abstract tree, whose every parameter a group covers.
    role: of each weight, as `nn.param.roles` tells it of a module.
  Returns:
    The optax transformation.
  Raises:
    UserError: groups do not fit the model; see `assign`.
  Source: AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101.
  """
  role = roles(model) if role is None else role
  kinds, rates, decays = {}, {}, {}
  for path, options in assign(config.groups, model).items():
    if options is not None:
      own = _role_of(path, role)
      kinds[path] = _kind_for(options.get("kind", config.kind), own)
      rates[path] = options.get("rate", 1.0)
      decays[path] = options.get("decay")
      if decays[path] is None:
        spared = own in _NOT_DECAYED or kinds[path] == "adam"
        decays[path] = 0.0 if spared else config.weight_decay
      elif decays[path] and kinds[path] == "adam":
        raise UserError(f"optim.groups: decay of {path!r}: kind 'adam' has none; use 'adamw'")
  for pattern, options in config.groups:
    if options and options.get("kind") == "muon" and not any(
      kinds.get(path) == "muon" for path in fnmatch.filter(kinds, pattern)
    ):
      raise UserError(f"optim.groups: pattern {pattern!r} matches no matrix for kind 'muon'")

  def decay(updates, params):
    one = lambda path, u, w: rates[path] * (u + decays[path] * w)  # noqa: E731
    return tree.map_with_path(one, updates, params)

  def rule(kind):
    peak = config.matrix_learning_rate if kind == "muon" else config.learning_rate
    return make_rule(kind, config, decay, make_schedule(config, steps, peak))

  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  used = sorted(set(kinds.values()))
  return optax.chain(clip, optax.partition({kind: rule(kind) for kind in used}, kinds))


def _kind_for(kind: str, role: str) -> str:
  """The optimizer of a parameter where its row says `kind`. A router's bias has no gradient and is
  moved by the step, which must move all that an optimizer keeps of it."""
  if (kind == "muon" and role != "matrix") or (kind == "schedule_free" and role == "router_bias"):
    return "adamw"
  return kind


def _role_of(path: str, role: dict[str, str]) -> str:
  while path and path not in role:
    path = path.rpartition("/")[0]
  return role[path]
