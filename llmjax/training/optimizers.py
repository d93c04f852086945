"""Optimizers by name: optax transformations without learning rate and weight decay, which
`training.optim` applies to all alike; and schedule-free's two sets of weights."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import schedule_free_eval_params

from llmjax.core import tree
from llmjax.core.choices import check_choice
from llmjax.core.dims import letters_of
from llmjax.core.errors import UserError
from llmjax.parallel import rules

NOT_OFFERED = {
  "soap": "optax has none, and its eigenvectors would need a layout of their own on a mesh",
  "sophia": "its estimate of the Hessian takes a second gradient of the objective, which a step "
  "does not compute",
}


def check_kind(where: str, kind):
  """Raises a `UserError` for an optimizer that is unknown or not offered, and why."""
  if kind in NOT_OFFERED:
    raise UserError(f"{where} {kind!r} is not offered: {NOT_OFFERED[kind]}")
  check_choice(where, kind, KINDS)


def _adam(config):
  return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _adafactor(config):
  return optax.chain(
    optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
  )


def _rms(config):
  """Adam's second moment alone; schedule-free's averaging takes the place of the first."""
  return optax.scale_by_rms(
    config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True
  )


def _muon(config):
  def scale(path, update):
    """Scales by √max(1, outputs / inputs)."""
    inputs, outputs = (
      math.prod(update.shape[axis] for axis in axes) for axes in _sides(path, update)
    )
    return update * math.sqrt(max(1.0, outputs / inputs))

  return optax.chain(
    optax.contrib.scale_by_muon(
      weight_dimension_numbers=lambda params: tree.map_with_path(_sides, params)
    ),
    optax.stateless(lambda updates, _: tree.map_with_path(scale, updates)),
  )


def _sides(path: str, leaf) -> optax.contrib.MuonDimensionNumbers:
  """Says which axes of a matrix are its input and its output. The residual width `d` (or else a low
  rank) is one side, all but layers `l` and experts `e` the other."""
  letters = letters_of(path, leaf.ndim)
  stacked = "le" if "f" in letters else "l"  # an expert's matrix is one of many
  axes = {letter: axis for axis, letter in enumerate(letters) if letter not in stacked}
  side = (axes.pop(next(letter for letter in "dra" if letter in axes)),)
  other = tuple(axes.values())
  return optax.contrib.MuonDimensionNumbers(*((side, other) if side < other else (other, side)))


_DIRECTIONS = {
  "adamw": _adam,
  "adam": _adam,
  "sgd": lambda config: optax.trace(config.beta1),
  "adafactor": _adafactor,
  "lion": lambda config: optax.scale_by_lion(config.beta1, config.beta2),
  "muon": _muon,
  "schedule_free": _rms,
}
KINDS = tuple(_DIRECTIONS)


def make_rule(
  kind: str, config, decay: Callable, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Builds the update of one kind: its direction, then decay, then the learning rate.

  Args:
    kind: one of `KINDS`.
    config: `OptimConfig`.
    decay: (updates, weights) -> updates with decoupled weight decay added.
    schedule: learning rate by updates done.
  Source: Adam: Kingma & Ba 2014, arXiv:1412.6980; Adafactor: Shazeer & Stern 2018,
    arXiv:1804.04235, alg. 5; Lion: Chen et al. 2023, arXiv:2302.06675; Muon: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; schedule-free: Defazio et al. 2024, arXiv:2405.15682, alg. 1.
  """
  rule = optax.chain(
    _DIRECTIONS[kind](config), optax.stateless(decay), optax.scale_by_learning_rate(schedule)
  )
  if kind == "schedule_free":  # which counts updates from 1
    rule = optax.contrib.schedule_free(rule, lambda count: schedule(count - 1), config.beta1)
  return rule


# Schedule-free takes gradients at y = (1 − β₁) z + β₁ x. Training states, checkpoints and whoever
# evaluates hold the averages x; z is in the optimizer's state.


def _is_free(state) -> bool:
  return isinstance(state, optax.contrib.ScheduleFreeState)


def _free_states(state) -> list:
  """Every schedule-free state in an optimizer's, its z without the leaves of other optimizers."""
  masked = lambda z: isinstance(z, optax.MaskedNode)  # noqa: E731
  return [
    free._replace(z={path: z for path, z in free.z.items() if not masked(z)})
    for free in filter(_is_free, jax.tree.leaves(state, is_leaf=_is_free))
  ]


def gradient_point(state, weights: dict, table: dict = rules.WEIGHTS) -> dict:
  """Returns the weights that gradients are taken at: schedule-free's y, all others as they are.

  Args:
    state: of an optimizer by `make_optimizer`.
    weights: trainable parameters by path, schedule-free's averages among them.
    table: layout of the result on the mesh in scope.
  """
  for free in _free_states(state):
    point = {path: (1 - free.b1) * z + free.b1 * weights[path] for path, z in free.z.items()}
    weights = weights | rules.constrain(point, table)
  return weights


def averaged(state, point: dict) -> dict:
  """Returns the weights to evaluate and keep, of those that an update made; the inverse of
  `gradient_point` for the state after it."""
  for free in _free_states(state):
    point = point | schedule_free_eval_params(free, {path: point[path] for path in free.z})
  return point


def started_from(state, weights: dict):
  """Returns the state of step 0 of an optimizer for other weights than it was made of."""
  def restart(free):
    if not _is_free(free):
      return free
    (free_z,) = (each.z for each in _free_states(free))
    own = {  # copies, since a step is given both
      path: jax.device_put(jnp.copy(weights[path]), z.sharding) for path, z in free_z.items()
    }
    return free._replace(z=free.z | own)

  return jax.tree.map(restart, state, is_leaf=_is_free)
