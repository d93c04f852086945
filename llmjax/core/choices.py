"""Checks shared by the config sections: a word out of a list, a number in a range."""

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
