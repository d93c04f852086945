"""Errors that a user can act on: one sentence, and exit status 2 or 1 on the command line."""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
  """The user's input was wrong; the message says what was looked for and what was there."""


class RunFailed(RuntimeError):
  """A run ended through no fault of the input, such as a killed process; the message says how."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `did you mean 'x'?`, or the list of what is known if nothing is similar to `name`."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  shown = ", ".join(known[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
  return f"known: {shown}" if known else "there are none"


def note(text: str, kind: str = "note"):
  """Prints a note (or a warning) on standard error, such as what was decided for the user."""
  print(f"llmjax: {kind}: {text}", file=sys.stderr, flush=True)
