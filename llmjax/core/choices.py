"""Checks that config sections share: a known word, a lower bound, a finite number, text."""

import dataclasses
import math

from llmjax.core.errors import UserError, nearest


def check_choice(key: str, value: str, known):
  """Raises a `UserError` with the nearest known word if `value` is not in `known`."""
  if value not in known:
    raise UserError(f"{key} {value!r} is unknown; {nearest(value, list(known))}")


def check_least(section: str, config, **least: float):
  """Raises a `UserError` if a field of `config` is below its lower bound."""
  for name, bound in least.items():
    if getattr(config, name) < bound:
      raise UserError(f"{section}.{name} {getattr(config, name)} is less than {bound}")


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


def check_texts(key: str, values: tuple):
  """Raises a `UserError` if an entry of a tuple is not a string."""
  for value in values:
    if not isinstance(value, str):
      raise UserError(f"{key} holds {value!r}, which is not a string")
