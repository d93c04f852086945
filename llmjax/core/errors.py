"""Errors a user can act on.

A `UserError` is an ordinary mistake: a typo in a key, a missing file, a mesh that does not divide.
The command line prints it as one line and exits with status 2; a notebook sees the same sentence.
"""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
  """The user's input was wrong; the message says what was looked for and what was there."""


class RunFailed(RuntimeError):
  """A run ended through no fault of the input, such as a killed process; one sentence says how."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Names what is closest to `name`, as a clause to end an error message with.

  Args:
    name: what was asked for.
    known: what exists.
  Returns:
    `did you mean 'x'?`, or the list of what exists when nothing is near.
  """
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  shown = ", ".join(known[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
  return f"known: {shown}" if known else "there are none"


def note(text: str):
  """Tells the user what was decided for them."""
  print(f"llmjax: note: {text}", file=sys.stderr)
