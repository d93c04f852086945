"""Checks that config sections share: a known word, bounds, a finite number."""

import dataclasses
import math

from llmjax.core.errors import UserError, nearest


def check_choice(key: str, value, known):
  """Raises a `UserError` with the nearest known value if `value` is not in `known`."""
  if value not in known:
    raise UserError(f"{key} {value!r} is unknown; {nearest(str(value), map(str, known))}")


def check_fields(section: str, config, **wanted):
  """Checks fields of a config.

  Args:
    **wanted: for each field its lower bound (a number), "positive", an interval such as "(0, 1]",
      or the values that it may have.
  Raises:
    UserError: the first field that is not as wanted.
  """
  for name, want in wanted.items():
    key, value = f"{section}.{name}".lstrip("."), getattr(config, name)
    if want == "positive":
      if value <= 0:
        raise UserError(f"{key} {value} is not positive")
    elif isinstance(want, str):
      low, high = map(float, want[1:-1].split(","))
      closed = {low: want[0] == "[", high: want[-1] == "]"}
      if not (low < value < high or closed.get(value)):
        raise UserError(f"{key} {value} is not in {want}")
    elif isinstance(want, (int, float)):
      if value < want:
        raise UserError(f"{key} {value} is less than {want}")
    else:
      check_choice(key, value, want)


def check_finite(name: str, value):
  """Raises a `UserError` if a number is NaN or infinite, also in sequences and dataclass fields."""
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      check_finite(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))
  elif isinstance(value, (tuple, list)):
    for each in value:
      check_finite(name, each)
  elif isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{name} {value} is not a finite number")
