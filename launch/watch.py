"""Watches the processes of a run on one machine until all have ended.

Process 0's output is shown; that of the others is kept, and shown when they fail. A process that
dies takes the others with it: they cannot go on alone, and the last checkpoint is on disk.
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
from llmjax.parallel.join import HEARTBEAT_S, lost

STOP_S = 30  # all processes have ended so long after one died
GRACE_S = 5  # of these, until those are killed that did not stop when they were asked to
# Said once, at the end: by the process, or in the launcher's own words.
_HELD = ("llmjax: error: ", "llmjax: stopped ", "llmjax: process ", "llmjax: failed: ")
_NOISE = "[Gloo] "  # on standard output, of every connection


class Watched:
  """Processes of one run, started together: what they say, and how they end, in order.

  Args:
    command: what each of them runs.
    environments: the variables of each.
  """

  def __init__(self, command: list[str], environments: list[dict[str, str]]):
    self._ended, self._queue, self._asked = [], queue.Queue(), 0
    self._tails = [deque(maxlen=200) for _ in environments]
    pipe = subprocess.PIPE
    self._processes = [  # in sessions of their own, so that Ctrl-C reaches them through here alone
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
    """Sends a signal to every process that still runs."""
    for process in self._processes:
      process.send_signal(number)

  def stop(self, *_):
    """Has all processes save a checkpoint and stop; the second time, kills them."""
    self._asked += 1
    self.signal(signal.SIGTERM if self._asked == 1 else signal.SIGKILL)

  def watch(self):
    """Waits until all have ended; after one failed, no longer than the grace."""
    left, deadline_s = len(self._processes), math.inf
    while left:
      try:
        status, left = self._queue.get(timeout=0.1), left - 1
      except queue.Empty:
        status = 0
      if status and deadline_s == math.inf:
        deadline_s = time.monotonic() + GRACE_S
        if status != 2:  # wrong input they find out by themselves
          self.signal(signal.SIGTERM)
      if time.monotonic() > deadline_s:
        self.signal(signal.SIGKILL)

  def verdict(self):
    """Returns if all processes ended well.

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
    if status != -signal.SIGKILL:  # of process 0 all but the held lines has been shown
      tail = self._tails[number]
      sys.stderr.writelines(line for line in tail if number or line.startswith(_HELD))
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    if silent := lost("".join(self._tails[number])):
      number, how = int(silent), f"was not heard of for {HEARTBEAT_S} s"
    raise RunFailed(
      f"process {number} of {len(self._processes)} (pid {self._processes[number].pid}) {how} and "
      "the others were stopped; the same command goes on from the last checkpoint"
    )
