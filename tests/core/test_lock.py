"""Proves that a workdir has one run at a time, and that those who died do not hold it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmjax.core import lock
from llmjax.core.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from llmjax.core.lock import locked
with locked(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def hold(workdir) -> subprocess.Popen:
  """A process that holds a workdir."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_run_is_refused_by_name_and_a_killed_ones_lock_is_taken_at_once(tmp_path):
  workdir = tmp_path / "run"
  process = hold(workdir)
  try:
    said = rf"held by process {process.pid} on .+, which began at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(UserError, match=said), lock.locked(workdir):
      pass
    assert json.loads((workdir / ".lock").read_text())["pid"] == process.pid, "it still holds it"
  finally:
    process.send_signal(signal.SIGKILL)
  began_s = time.monotonic()
  with lock.locked(workdir):  # the dead process has not even been waited for
    assert json.loads((workdir / ".lock").read_text())["pid"] == os.getpid()
  assert time.monotonic() - began_s < lock.DEAD_S / 2, "not after a heartbeat's silence"
  assert list(workdir.iterdir()) == []
  process.wait()


def test_a_process_number_that_another_program_has_by_now_holds_nothing(tmp_path):
  (tmp_path / ".lock").write_text(json.dumps(lock.identity() | {"born": "1", "run": "x"}))
  with lock.locked(tmp_path):
    pass


@pytest.mark.parametrize("content", ["other", ""], ids=["another machine", "half written"])
@pytest.mark.parametrize("touched", [True, False])
def test_elsewhere_a_heartbeat_tells_the_living(content, touched, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lock, "DEAD_S", 0.5)
  path = tmp_path / ".lock"
  owner = lock.identity() | {"machine": "elsewhere", "host": "node7", "pid": 1, "run": "x"}
  path.write_text(content and json.dumps(owner))
  over = threading.Event()

  def beat():
    while touched and not over.wait(0.05):
      os.utime(path)

  beats = threading.Thread(target=beat)
  beats.start()
  expected = contextlib.nullcontext()
  if touched:
    expected = pytest.raises(UserError, match="process 1 on node7" if content else "held by a run")
  with expected, lock.locked(tmp_path):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  over.set()
  beats.join()
  assert path.exists() == touched
  assert ("sign of process 1 on node7" in capsys.readouterr().err) == bool(content)


@pytest.mark.parametrize("killed", [".lock", ".lock.taking"])
def test_one_of_many_who_find_a_dead_owner_gets_the_lock(killed, tmp_path):
  (tmp_path / killed).write_text(json.dumps(lock.identity() | {"born": "1", "run": "x"}))
  (tmp_path / ".lock").write_text(json.dumps(lock.identity() | {"born": "1", "run": "x"}))
  start, got, refused = threading.Barrier(8), [], []

  def contend():
    start.wait()
    try:
      with lock.locked(tmp_path):
        got.append(json.loads((tmp_path / ".lock").read_text())["run"])
        done.wait(20)
    except UserError as error:
      refused.append(str(error))
      if len(refused) == 7:
        done.set()

  done = threading.Event()
  threads = [threading.Thread(target=contend) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 1 and len(refused) == 7
  assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_is_seen_and_a_lock_that_was_taken_ends_the_process(tmp_path):
  code = HOLD.replace("with locked", "from llmjax.core import lock\nlock.BEAT_S = 0.1\nwith locked")
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  process.stdout.readline()
  first = lock._read(tmp_path / ".lock")[1]
  until_s = time.monotonic() + 30
  while lock._read(tmp_path / ".lock")[1] == first and time.monotonic() < until_s:
    time.sleep(0.01)
  assert lock._read(tmp_path / ".lock")[1] > first
  (tmp_path / ".lock").write_text(json.dumps(lock.identity()))
  _, err = process.communicate(timeout=30)
  assert process.returncode == 1 and re.search("taken by another run while this", err)


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_what_is_no_folder_is_told(kind, tmp_path):
  (tmp_path / "file").write_text("x")
  workdir = tmp_path / "file" if kind == "file" else tmp_path / "file/run"
  with pytest.raises(UserError, match=r"workdir .* cannot be written: "), lock.locked(workdir):
    pass


def test_a_failed_command_leaves_no_folder_that_was_not_there(tmp_path):
  for workdir in (tmp_path / "new", tmp_path):
    with contextlib.suppress(UserError), lock.locked(workdir):
      raise UserError("something else")
  assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []
