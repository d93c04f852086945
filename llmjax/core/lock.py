"""One run per workdir: a lock file that names its owner, created with O_EXCL, which network file
systems respect, and touched every few seconds. An owner is dead, and loses the lock, if this
machine no longer runs its process, or if another machine's touches stop."""

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
_KILLED_S = 1.0  # within which a killed process disappears
_NAME = ".lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Locks a workdir, created if it is missing, against other runs.

  Raises:
    UserError: another run holds it, or it is not a writable folder.
  """
  new = not workdir.exists()
  path = workdir / _NAME
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    me = _acquire(path)
  except OSError as error:
    if full_disk(error):
      raise
    raise UserError(f"workdir {str(workdir)!r} cannot be written: {error.strerror}") from error
  done = threading.Event()
  threading.Thread(target=_beat, args=(path, me, done), daemon=True).start()
  try:
    yield
  finally:
    done.set()
    if _read(path)[0] == me:
      path.unlink(missing_ok=True)
    if new:
      with contextlib.suppress(OSError):  # the folder is not empty
        workdir.rmdir()


def _acquire(path: Path) -> dict:
  """Creates the lock file, removing that of a dead owner; returns its content."""
  me = identity()
  while True:
    with contextlib.suppress(FileExistsError):
      _create(path, me)
      return me
    found, alive = _watch(path)
    owner = found[0]
    if not alive:
      _remove(path, found, me)
    elif _read(path)[0] == owner and path.exists():
      who = "a run" if owner is None else (
        f"process {owner['pid']} on {owner['host']}, which began at {owner['began']}"
      )
      folder = str(path.parent)
      raise UserError(f"workdir {folder!r} is held by {who}; use another, or end that run")


def _remove(path: Path, found: tuple, me: dict):
  """Removes a dead owner's lock, under a second lock so that nobody removes a successor's."""
  removing = path.with_name(f"{path.name}.taking")
  try:
    _create(removing, me)
  except FileExistsError:
    if not _watch(removing)[1]:  # its process was killed between these lines
      removing.unlink(missing_ok=True)
    return
  try:
    if _read(path) == found:
      path.unlink(missing_ok=True)
  finally:
    removing.unlink(missing_ok=True)


def _create(path: Path, me: dict):
  with path.open("x") as file:
    try:
      json.dump(me, file)
      file.flush()
    except OSError:
      path.unlink()
      raise


def _watch(path: Path) -> tuple[tuple, bool]:
  """Returns what a lock holds and whether its owner lives, waiting for a touch if it must."""
  found = owner, touched = _read(path)
  local = owner and is_alive(owner) is not None
  if owner and not local:
    text = f"waiting up to {DEAD_S:.0f} s for a sign of process {owner['pid']} on {owner['host']}"
    print(text, file=sys.stderr, flush=True)
  until_s = time.monotonic() + (_KILLED_S if local else DEAD_S)
  while True:
    alive = is_alive(owner) if local else _read(path)[1] != touched
    if bool(alive) != bool(local) or time.monotonic() > until_s or not path.exists():
      return found, bool(alive) or not path.exists()
    time.sleep(0.05)


def _beat(path: Path, me: dict, done: threading.Event):
  """Touches the lock regularly; ends the process if another run has taken it."""
  while not done.wait(BEAT_S):
    with contextlib.suppress(OSError):  # a file system that is unavailable gets no touch
      found = _read(path)[0]
      if found not in (me, None) and not done.is_set():
        text = f"llmjax: failed: {path} was taken by another run while this process stood still"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
      os.utime(path) if found else _create(path, me)


def identity() -> dict:
  """Describes this process so that it can be told from every other, also later and elsewhere."""
  return {
    "host": socket.gethostname(), "pid": os.getpid(),
    "began": time.strftime("%Y-%m-%d %H:%M:%S %z"), "born": _start_time(os.getpid()),
    "machine": _machine(), "run": uuid.uuid4().hex,
  }


def is_alive(owner: dict) -> bool | None:
  """Tells whether the process of an `identity` still runs; None on another machine."""
  return _start_time(owner["pid"]) == owner["born"] if owner["machine"] == _machine() else None


def _machine() -> str:
  """Identifies the scope of process ids: a boot of a machine, and a container on it."""
  names = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Linux
    names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    names += [os.readlink("/proc/self/ns/pid")]
  return " ".join(names)


def _start_time(pid: int) -> str:
  """The start time of a process in kernel ticks; empty if it has ended."""
  if not Path("/proc/self/stat").exists():  # not Linux
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


def _read(path: Path) -> tuple[dict | None, int | None]:
  """Reads a lock: its owner (None if incomplete) and its last touch (None if there is no file)."""
  try:
    with path.open() as file:  # opened, so that network file systems ask the server
      touched = os.fstat(file.fileno()).st_mtime_ns
      return json.load(file), touched
  except FileNotFoundError:
    return None, None
  except ValueError:
    return None, touched
