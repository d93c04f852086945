"""Learning-rate schedules by name: a linear warm-up, then what `optim.schedule` says."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from llmjax.core.choices import check_choice
from llmjax.core.errors import UserError

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")
_OPTIONS = {  # of each schedule, with defaults
  "cosine": {"cycles": 1},
  "linear": {"cycles": 1},
  "wsd": {"decay": 0.2, "shape": "sqrt"},
}
SHAPES = {"sqrt": lambda share: 1 - jnp.sqrt(share), "linear": lambda share: 1 - share}


def parse_schedule(text: str) -> tuple[str, dict]:
  """Reads `optim.schedule`, such as `wsd:decay=0.1,shape=linear`: (name, options with defaults).

  Raises:
    UserError: an unknown name or option, or a value that the option cannot have.
  """
  name, _, given = text.partition(":")
  check_choice("optim.schedule", name, SCHEDULES)
  options = dict(_OPTIONS.get(name, {}))
  for each in given.split(",") if given else ():
    key, _, value = each.partition("=")
    if key not in options:
      known = f"its options are {', '.join(options)}" if options else "it has no options"
      raise UserError(f"optim.schedule {text!r}: {name} has no option {key!r}; {known}")
    options[key] = _value(text, key, value)
  return name, options


def _value(text: str, key: str, value: str):
  if key == "shape":
    check_choice(f"optim.schedule {text!r}: shape", value, SHAPES)
    return value
  try:
    number = float(value)
  except ValueError:
    number = 0.0
  whole = number >= 1 and number.is_integer()
  if whole or (key == "decay" and 0 < number < 1):
    return int(number) if whole else number
  wanted = "a fraction of the steps or a number of steps" if key == "decay" else "a whole number"
  raise UserError(f"optim.schedule {text!r}: {key} {value!r} is not {wanted}")


def of_run(length: float, steps: int) -> int:
  """Number of steps of a warm-up or a decay; below 1 it is a fraction of the run's."""
  return round(length * steps) if length < 1 else int(length)


def check_schedule(config, steps: int, done: int = 0):
  """Refuses a schedule that is longer than the run.

  Args:
    config: `OptimConfig`.
    steps: length of the run.
    done: steps that the run goes on from under another schedule or number of steps.
  Raises:
    UserError: the warm-up never ends, WSD's decay has no step, begins in the warm-up or should have
      begun before the steps done, or there are more cycles than steps.
  """
  text, warmup = config.schedule, of_run(config.warmup, steps)
  if warmup >= steps:
    raise UserError(
      f"optim.warmup {warmup} is not below train.steps {steps}, so that the learning rate would "
      "rise to the end; give fewer steps, or a fraction such as 0.1"
    )
  name, options = parse_schedule(text)
  if options.get("cycles", 1) > steps - warmup:
    raise UserError(
      f"optim.schedule {text!r}: {options['cycles']} cycles do not fit into the {steps - warmup} "
      "steps after optim.warmup"
    )
  if name == "wsd":
    length, done = of_run(options["decay"], steps), min(done, steps)
    if not 0 < length <= steps - max(warmup, done):
      after = f"step {done}, where the run goes on" if done > warmup else f"optim.warmup {warmup}"
      raise UserError(
        f"optim.schedule {text!r}: a decay of {length} steps does not fit into the "
        f"{steps - max(warmup, done)} steps of train.steps {steps} after {after}"
      )


def make_schedule(config, steps: int, peak: float) -> optax.Schedule:
  """Learning rate by updates done: up linearly to `peak`, then as `optim.schedule` says.

  The run's update number 1 already moves; number `warmup` is at the peak, number `steps` is at the
  end of the schedule. A run of no more steps than `warmup` ends as it warms up.

  Args:
    config: `OptimConfig`.
    steps: length of the run.
  Source: cycles: Loshchilov & Hutter 2016, arXiv:1608.03983; inverse_sqrt: Vaswani et al. 2017,
    arXiv:1706.03762, sec. 5.3; wsd: Hu et al. 2024, arXiv:2404.06395; its decay by 1 − √:
    Hägele et al. 2024, arXiv:2405.18392.
  """
  name, options = parse_schedule(config.schedule)
  warmup = of_run(config.warmup, steps)
  length = max(steps - warmup, 1)
  floor = peak * config.min_lr_ratio
  if name == "cosine":
    after = optax.cosine_decay_schedule(peak, length, floor / peak)
  elif name == "linear":
    after = optax.linear_schedule(peak, floor, length)
  elif name == "constant":
    after = optax.constant_schedule(peak)
  elif name == "inverse_sqrt":
    after = lambda count: peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(count + warmup, 1))  # noqa: E731
  else:
    after = _stable_then_decay(
      peak, floor, length, of_run(options["decay"], steps), options["shape"]
    )
  if options.get("cycles", 1) > 1:
    after = _repeated(after, length, options["cycles"])
  rise = optax.linear_schedule(0.0, peak, warmup)
  rate = optax.join_schedules([rise, after], [warmup])
  return lambda done: rate(done + 1)


def _repeated(schedule: Callable, length: int, cycles: int) -> optax.Schedule:
  """`cycles` copies of a schedule of `length` updates, each that many times as fast. An update
  that ends a cycle is at its floor, so that the next one is the first of the next cycle."""

  def rate(count):
    count = jnp.clip(count, 0, length) * cycles
    return schedule(count - jnp.maximum(count - 1, 0) // length * length)

  return rate


def _stable_then_decay(peak, floor, length, decay, shape) -> optax.Schedule:
  def rate(count):
    share = jnp.clip((count - (length - decay)) / max(decay, 1), 0, 1)
    # Exactly the peak before, so that a decay branches off a constant rate.
    return jnp.where(share > 0, floor + (peak - floor) * SHAPES[shape](share), peak)

  return rate
