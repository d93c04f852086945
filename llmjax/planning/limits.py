"""What a run may take, as a command line says it: tokens, dollars, days."""

import dataclasses
import math
import re

from llmjax.core.errors import UserError

_UNITS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def above_zero(flag: str, value: float | None):
  """Raises a `UserError` where a number was given and is not a finite one above 0."""
  if value is not None and not 0 < value < math.inf:
    raise UserError(f"{flag}={value} is not a number above 0")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a run may take; 0 leaves each open.

  Attributes:
    tokens: of the whole run.
    budget_usd: for them.
    max_days: for them.
    usd_per_hour: of a chip, instead of the list price.
  """

  tokens: float = 0.0
  budget_usd: float = 0.0
  max_days: float = 0.0
  usd_per_hour: float = 0.0

  def __post_init__(self):
    for name, value in vars(self).items():
      above_zero(name, value or None)
    if not self.tokens and (self.budget_usd or self.max_days):
      raise UserError("--budget and --max-days need --tokens, such as --tokens=20B")


def amount(text: str, flag: str, example: str) -> float:
  """Reads `20B`, `1.5T`, `$2,500` or `2e10`; "" is 0.

  Raises:
    UserError: another form, told with the example.
  """
  found = re.fullmatch(r"\$?([\d,]*\.?\d+(?:e\d+)?)([kKMBT]?)", text.strip() or "0")
  value = float(found[1].replace(",", "")) * _UNITS[found[2]] if found else 0
  if text.strip() and not value:
    raise UserError(f"{flag}={text} is not an amount above 0, such as {flag}={example}")
  return value
