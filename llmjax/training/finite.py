"""Stops a run whose loss or gradient is not finite, naming the step and its documents. The step
leaves the state as it was (`advance`). Its metrics arrive two steps late, so the states of those
steps are dropped; before a checkpoint all metrics are waited for."""

import math
from collections.abc import Callable

from llmjax.core.errors import RunFailed
from llmjax.data.pack import PackedRows
from llmjax.training.metrics import Pending

_NAMES = {"loss": "loss", "grad_norm": "gradient norm"}
_SHOWN = 8  # documents named


class NotFinite(RunFailed):
  """The loss or gradient of step number `step` is not finite."""

  def __init__(self, step: int, text: str):
    super().__init__(f"step {step}: {text}")
    self.step = step


class Watch:
  """Checks every step's loss and gradient norm, in all processes alike.

  Args:
    rows: packed rows of the training text.
    batch_size: rows a step.
    name: gives the name of document number i.
  """

  def __init__(self, rows: PackedRows, batch_size: int, name: Callable[[int], str]):
    self._rows, self._batch_size, self._name = rows, batch_size, name
    self._pending = Pending()

  def add(self, step: int, metrics: dict):
    """Queues a step's device values and checks those that are due.

    Raises:
      NotFinite: one of them is not finite.
    """
    self._check(self._pending.add(step, {key: metrics[key] for key in _NAMES}))

  def flush(self):
    """Checks all that is pending; raises what `add` does."""
    self._check(self._pending.flush())

  def _check(self, due):
    for step, values, *_ in due:
      bad = [key for key in _NAMES if not math.isfinite(values[key])]
      if bad:
        what = " and ".join(f"the {_NAMES[key]} is {values[key]}" for key in bad)
        raise NotFinite(step, f"{what} on {self._batch(step)}; the update was not applied")

  def _batch(self, step: int) -> str:
    first = (step - 1) * self._batch_size
    numbers = range(first, first + self._batch_size)
    documents = dict.fromkeys(i for row in numbers for i, *_ in self._rows.pieces(row))
    names = [self._name(i) for i in list(documents)[:_SHOWN]]
    more = f", … ({len(documents)} in all)" if len(documents) > _SHOWN else ""
    return f"rows {first} to {numbers[-1]} of the packed text (documents {', '.join(names)}{more})"
