"""Ctrl-C ends a command soon, even while a library runs that does not check for signals. Python
raises KeyboardInterrupt only between its own instructions, so training a tokenizer or compiling
would finish first; a thread sees the signal at once and ends the process if need be."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 2.0  # time for Python to handle the signal itself, which removes unfinished files


def say(text: str = ""):
  """Reports that the user stopped the command, or the given state in which it stopped."""
  text = f"llmjax: {text or 'interrupted'}; rerun the same command to resume"
  print(text, file=sys.stderr, flush=True)


def _end():
  say()
  os._exit(1)


def _at_start(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    _end()
  sys.__excepthook__(kind, error, trace)


# Only for the command line, whose imports take seconds; other programs keep their own hook.
if Path(sys.argv[0]).name in ("-m", "llmjax"):
  sys.excepthook = _at_start


@contextlib.contextmanager
def end_on_sigint() -> Iterator[None]:
  """Ends the process with status 1 if SIGINT is not handled within `GRACE_S`.

  The first SIGINT is left to another handler where one is installed, such as the training loop's.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  done = threading.Event()
  previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch():
    for count, number in enumerate(iter(lambda: os.read(reader, 1), b"")):
      default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
      if number[0] == signal.SIGINT and (default or count) and not done.wait(GRACE_S):
        _end()
    os.close(reader)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    done.set()
    signal.set_wakeup_fd(previous)
    os.close(writer)
