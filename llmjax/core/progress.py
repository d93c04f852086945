"""Progress of long work on standard error: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_S = 10.0  # between plain lines


class ProgressLine:
  """A bar on a terminal, a plain line every few seconds elsewhere; always on standard error.

  Args:
    total: units of work in all.
    done: of them, those done before, which took no time of this session.
    unit: what is counted.
  """

  def __init__(self, total: int, done: int = 0, unit: str = "step"):
    console = Console(stderr=True)
    self._total, self._first, self._unit = total, done, unit
    self._start_s = self._last_s = time.perf_counter()
    self._bar = None
    if console.is_terminal:
      self._bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
      )
      self._task = self._bar.add_task("starting", total=total, completed=done)
      self._bar.start()

  def update(self, done: int, text: str):
    """Shows how much is done, with a few words of its state."""
    if self._bar:
      self._bar.update(self._task, completed=done, description=text)
      return
    now_s = time.perf_counter()
    if now_s - self._last_s >= _EVERY_S or done == self._total:
      self._last_s = now_s
      left_s = (now_s - self._start_s) / max(1, done - self._first) * (self._total - done)
      count = f"{self._unit} {done}/{self._total}"
      print(f"{count}  {text}  {left_s:.0f} s left", file=sys.stderr, flush=True)

  def close(self):
    """Ends the bar."""
    if self._bar:
      self._bar.stop()
