"""Proves that Ctrl-C ends a command in one sentence, whatever it is doing."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SAID = "llmjax: interrupted; rerun the same command to resume\n"
# The file alone, so that nothing else has to be imported; a lock taken twice is deaf to signals.
HEAD = """
import ctypes, signal, sys, time
sys.path.append("llmjax/core")
import interrupt
interrupt.GRACE_S = 0.5
library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def be_deaf():
  print("ready", flush=True)
  for _ in range(2):
    library.pthread_mutex_lock(lock)
"""


def start(code: str) -> subprocess.Popen:
  """A program that is under way."""
  process = subprocess.Popen(
    [sys.executable, "-c", HEAD + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  return process


def end(process) -> tuple[int, str]:
  time.sleep(0.5)  # until it is in the call that it spoke before
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  return process.returncode, err


def test_a_library_that_does_not_look_at_signals_is_ended():
  assert end(start("with interrupt.end_on_sigint():\n  be_deaf()")) == (1, SAID)


def test_the_first_signal_is_left_to_another_handler_and_the_second_ends():
  process = start("""
signal.signal(signal.SIGINT, lambda *_: None)
with interrupt.end_on_sigint():
  be_deaf()
""")
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(1.5)
  assert end(process) == (1, SAID)


def test_what_looks_at_signals_ends_by_itself_and_nothing_is_left_behind():
  process = start("""
before = signal.set_wakeup_fd(-1)
try:
  with interrupt.end_on_sigint():
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
  interrupt.say("cleared away")
assert signal.set_wakeup_fd(-1) == before
time.sleep(0.5)
sys.exit(7)
""")
  assert end(process) == (7, SAID.replace("interrupted", "cleared away"))


def test_ctrl_c_while_a_command_is_still_imported_is_told_as_later():
  late = "print('ready', flush=True); time.sleep(30)"
  process = start(late)
  status, err = end(process)
  assert status != 1 and "Traceback" in err, "a program that imports llmjax has its own way"
  code = HEAD.replace("import interrupt", 'sys.argv[0] = "-m"; import interrupt') + late
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.readline()
  assert end(process) == (1, SAID)
