"""Ctrl-C ends a command soon, also while a library works that never looks at signals.

Python raises KeyboardInterrupt between two of its own instructions, so that training a tokenizer or
compiling a program would end first. A thread hears of the signal at once and, where nothing
happened by then, ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 2.0  # for Python's own way: what is half written is removed


def say(text: str = ""):
  """Tells that the user stopped the command, and in what state it is if there is more to say."""
  print(f"llmjax: {text or 'interrupted'}; the same command goes on", file=sys.stderr, flush=True)


def _end():
  say()
  os._exit(1)


def _at_start(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    _end()
  sys.__excepthook__(kind, error, trace)


# Of the command line alone, which takes seconds to import; what imports llmjax is not ours to end.
if Path(sys.argv[0]).name in ("-m", "llmjax"):
  sys.excepthook = _at_start


@contextlib.contextmanager
def prompt() -> Iterator[None]:
  """Ends the process with status 1 where SIGINT goes unheard for `GRACE_S`.

  Somebody else's handler, such as the training loop's, deals with the first SIGINT by itself.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  over = threading.Event()
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def wait():
    for times, number in enumerate(iter(lambda: os.read(reader, 1), b"")):
      ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
      if number[0] == signal.SIGINT and (ours or times) and not over.wait(GRACE_S):
        _end()
    os.close(reader)

  threading.Thread(target=wait, daemon=True).start()
  try:
    yield
  finally:
    over.set()
    signal.set_wakeup_fd(before)
    os.close(writer)
