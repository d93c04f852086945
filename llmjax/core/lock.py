"""One run a workdir: a file that names who writes there, taken from those who are dead.

The file is made with O_EXCL, which holds on network file systems too, and touched every few
seconds. Its owner is dead where this machine no longer has its process, or, on another machine,
where nobody touches the file for `DEAD_S`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from llmjax.core.errors import UserError
from llmjax.core.files import full_disk

BEAT_S = 5.0  # between touches
DEAD_S = 60.0  # an owner on another machine that is silent for so long is dead
_KILLED_S = 1.0  # until a killed process has given its memory back
_NAME = ".lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds a workdir, made if it is missing, against other runs.

  Raises:
    UserError: another run holds it, or it is no folder that can be written.
  """
  new = not workdir.exists()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    me = _take(workdir / _NAME, workdir)
  except OSError as error:
    if full_disk(error):
      raise
    raise UserError(f"workdir {str(workdir)!r} cannot be written: {error.strerror}") from error
  done = threading.Event()
  threading.Thread(target=_beat, args=(workdir / _NAME, me, done), daemon=True).start()
  try:
    yield
  finally:
    done.set()
    if _look(workdir / _NAME)[0] == me:
      (workdir / _NAME).unlink(missing_ok=True)
    if new:
      with contextlib.suppress(OSError):  # something is in it
        workdir.rmdir()


def _take(path: Path, workdir: Path) -> dict:
  """Makes the lock file, once whoever holds it is known to be dead; returns what it says."""
  me = identity()
  while True:
    with contextlib.suppress(FileExistsError):
      _make(path, me)
      return me
    found, alive = _watch(path)
    owner = found[0]
    if not alive:
      _remove(path, found, me)
    elif _look(path)[0] == owner and path.exists():
      who = "a run" if owner is None else (
        f"process {owner['pid']} on {owner['host']}, which began at {owner['began']}"
      )
      raise UserError(f"workdir {str(workdir)!r} is held by {who}; use another, or end that run")


def _remove(path: Path, found: tuple, me: dict):
  """Removes a dead owner's lock, one process at a time: nobody removes that of a successor."""
  taking = path.with_name(f"{path.name}.taking")
  try:
    _make(taking, me)
  except FileExistsError:
    if not _watch(taking)[1]:  # killed between these lines
      taking.unlink(missing_ok=True)
    return
  try:
    if _look(path) == found:
      path.unlink(missing_ok=True)
  finally:
    taking.unlink(missing_ok=True)


def _make(path: Path, me: dict):
  with path.open("x") as file:
    try:
      json.dump(me, file)
      file.flush()
    except OSError:
      path.unlink()
      raise


def _watch(path: Path) -> tuple[tuple, bool]:
  """What a lock is and whether its owner lives; clocks differ, so other machines' are watched."""
  found = owner, touched = _look(path)
  known = owner and is_alive(owner) is not None
  if owner and not known:
    text = f"waiting up to {DEAD_S:.0f} s for a sign of process {owner['pid']} on {owner['host']}"
    print(text, file=sys.stderr, flush=True)
  until_s = time.monotonic() + (_KILLED_S if known else DEAD_S)
  while True:
    alive = is_alive(owner) if known else _look(path)[1] != touched
    if bool(alive) != bool(known) or time.monotonic() > until_s or not path.exists():
      return found, bool(alive) or not path.exists()
    time.sleep(0.05)


def _beat(path: Path, me: dict, done: threading.Event):
  """Touches the lock; ends the process where another run has taken it."""
  while not done.wait(BEAT_S):
    with contextlib.suppress(OSError):  # the file system is away: others see no touch
      found = _look(path)[0]
      if found not in (me, None) and not done.is_set():
        text = f"llmjax: failed: {path} was taken by another run while this process stood still"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
      os.utime(path) if found else _make(path, me)


def identity() -> dict:
  """What tells this process from all others, now and later, here and on other machines."""
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "born": _born(os.getpid()),
    "machine": _machine(),
    "run": uuid.uuid4().hex,
  }


def is_alive(owner: dict) -> bool | None:
  """Tells whether the process of an `identity` still runs; None of another machine's."""
  return _born(owner["pid"]) == owner["born"] if owner["machine"] == _machine() else None


def _machine() -> str:
  """Within which process numbers mean the same: a boot of a machine, a container of it."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Linux
    parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    parts += [os.readlink("/proc/self/ns/pid")]
  return " ".join(parts)


def _born(pid: int) -> str:
  """When a process began, in the kernel's ticks; empty if it has ended."""
  if not Path("/proc/self/stat").exists():  # another system than Linux
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return ""
    except PermissionError:
      pass
    return "there"
  try:
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if state in "ZX" else fields[18]


def _look(path: Path) -> tuple[dict | None, int | None]:
  """What a lock says, None if it is not whole, and when it was last touched, None if it is gone.

  The file is opened, because network file systems then ask the server.
  """
  try:
    with path.open() as file:
      touched = os.fstat(file.fileno()).st_mtime_ns
      return json.load(file), touched
  except FileNotFoundError:
    return None, None
  except ValueError:
    return None, touched
