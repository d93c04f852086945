"""Checks shared by the config sections: a word out of a list, a number in a range, a finite one."""

import dataclasses
import math

from llmjax.core.errors import UserError, nearest


def check_choice(key: str, value: str, known):
  """Raises a `UserError` that names the nearest known word where `value` is none of `known`."""
  if value not in known:
    raise UserError(f"{key} {value!r} is unknown; {nearest(value, list(known))}")


def check_least(section: str, config, **least: float):
  """Raises a `UserError` where a field of `config` is below its least value."""
  for name, bound in least.items():
    if getattr(config, name) < bound:
      raise UserError(f"{section}.{name} {getattr(config, name)} is less than {bound}")


def check_finite(name: str, value):
  """Raises a `UserError` where a number is NaN or infinite.

  Args:
    name: of the value, for the message.
    value: anything: numbers are looked for in tuples, lists and the fields of dataclasses, too.
  """
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      check_finite(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))
  elif isinstance(value, (tuple, list)):
    for each in value:
      check_finite(name, each)
  elif isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{name} {value} is not a finite number")


def check_texts(key: str, values: tuple):
  """Raises a `UserError` where an entry of a tuple is no text."""
  for value in values:
    if not isinstance(value, str):
      raise UserError(f"{key} holds {value!r}, which is no text")
