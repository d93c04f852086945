"""Watches the processes of a run on one machine until all have ended.

The output of process 0 is shown; that of the others is kept and shown if they fail. When a process
dies the others are ended too: they cannot continue alone, and the last checkpoint is on disk.
"""

import math
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque

from llmjax.core.errors import RunFailed, UserError
from llmjax.parallel.join import HEARTBEAT_S, silent_process

STOP_S = 30  # within which all processes have ended after one died
GRACE_S = 5  # after which processes that did not stop on SIGTERM are killed
# Lines that are not shown at once but used for the launcher's last line.
_HELD = ("llmjax: error: ", "llmjax: stopped ", "llmjax: process ", "llmjax: failed: ")
_NOISE = "[Gloo] "  # printed on standard output for every connection


class Watched:
  """The processes of one run, started together: their output, and the order in which they end.

  Args:
    command: command line of every process.
    environments: environment variables of each process.
  """

  def __init__(self, command: list[str], environments: list[dict[str, str]]):
    self._ended, self._queue, self._asked = [], queue.Queue(), 0
    self._tails = [deque(maxlen=200) for _ in environments]
    pipe = subprocess.PIPE
    self._processes = [  # each in its own session, so that only this process receives Ctrl-C
      subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
        errors="replace", start_new_session=True,
      )
      for env in environments
    ]
    for number in range(len(environments)):
      threading.Thread(target=self._follow, args=(number,), daemon=True).start()

  def _follow(self, number: int):
    process = self._processes[number]
    pipes = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    readers = [threading.Thread(target=self._read, args=(number, *pair)) for pair in pipes]
    for reader in readers:
      reader.daemon = True
      reader.start()
    self._ended.append((number, process.wait()))
    for reader in readers:
      reader.join(1)
    self._queue.put(process.returncode)

  def _read(self, number: int, pipe, to):
    for line in pipe:
      if line.startswith(_NOISE):
        continue
      self._tails[number].append(line)
      aftermath = bool(self._ended) and self._ended[0][0] != number and self._ended[0][1]
      if number == 0 and not aftermath and not line.startswith(_HELD):
        print(line, end="", file=to, flush=True)

  def signal(self, number: int):
    """Sends a signal to every process that is still running."""
    for process in self._processes:
      process.send_signal(number)

  def stop(self, *_):
    """Makes all processes save a checkpoint and stop; a second call kills them."""
    self._asked += 1
    self.signal(signal.SIGTERM if self._asked == 1 else signal.SIGKILL)

  def watch(self):
    """Waits until all processes have ended, at most `GRACE_S` after one failed."""
    left, deadline_s = len(self._processes), math.inf
    while left:
      try:
        status, left = self._queue.get(timeout=0.1), left - 1
      except queue.Empty:
        status = 0
      if status and deadline_s == math.inf:
        deadline_s = time.monotonic() + GRACE_S
        if status != 2:  # with wrong input, all of them end by themselves
          self.signal(signal.SIGTERM)
      if time.monotonic() > deadline_s:
        self.signal(signal.SIGKILL)

  def verdict(self):
    """Returns if all processes succeeded.

    Raises:
      UserError: a process found the input wrong.
      RunFailed: a process died; the message says which one and how.
      KeyboardInterrupt: `stop` was called.
    """
    failed = [(number, status) for number, status in self._ended if status]
    said = [line for tail in self._tails for line in tail if line.startswith(_HELD)]
    errors = [line for line in said if line.startswith(_HELD[0])]
    if not failed:
      return
    if errors:
      raise UserError(errors[0].removeprefix(_HELD[0]))
    if failures := [line for line in said if line.startswith(_HELD[3])]:
      raise RunFailed(failures[0].removeprefix(_HELD[3]).rstrip())
    if self._asked:
      stops = [line for line in said if line.startswith(_HELD[1])]
      stopped = "".join(stops[:1]).removeprefix("llmjax: ").partition(";")[0]
      raise KeyboardInterrupt(stopped or "interrupted")
    number, status = failed[0]
    if status != -signal.SIGKILL:  # process 0's other lines have been shown
      tail = self._tails[number]
      sys.stderr.writelines(line for line in tail if number or line.startswith(_HELD))
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    if silent := silent_process("".join(self._tails[number])):
      number, how = int(silent), f"sent no heartbeat for {HEARTBEAT_S} s"
    raise RunFailed(
      f"process {number} of {len(self._processes)} (pid {self._processes[number].pid}) {how} and "
      "the others were stopped; rerun the same command to resume from the last checkpoint"
    )
