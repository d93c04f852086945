"""`make venv` asks where the environment says: through a proxy, or at another package index.

A local server notes what is asked of it and refuses, so no test needs a network.
"""

import contextlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def _listener():
  """Serves on a free local port; yields (address, list of requests seen)."""
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def refuse(self):
      seen.append(f"{self.command} {self.path}")
      self.send_error(403)

    do_GET = do_CONNECT = refuse
    log_message = lambda self, *args: None  # noqa: E731

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", seen
  finally:
    server.shutdown()
    server.server_close()


def _make_venv(folder: Path, *arguments: str, **environment: str):
  """Runs `make venv` in a folder of its own with a lock of one package."""
  lock = folder / "one.lock"
  lock.write_text("six==1.17.0\n")
  ours = ("pip_", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "make", "mflags")
  clean = {k: v for k, v in os.environ.items() if not k.lower().startswith(ours)}
  return subprocess.run(
    ["make", "venv", f"VENV={folder / 'venv'}", f"LOCK={lock}", *arguments],
    cwd=ROOT,
    env=clean | {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"} | environment,
    capture_output=True,
    text=True,
  )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.slow
def test_make_venv_goes_through_a_proxy_and_to_an_index(tmp_path):
  here = f"PYTHONS={sys.executable}"
  with _listener() as (address, seen):
    done = _make_venv(
      tmp_path, here, HTTPS_PROXY=address, PIP_INDEX_URL="https://pypi.org/simple"
    )
    assert set(seen) == {"CONNECT pypi.org:443"}, done.stderr
  with _listener() as (address, seen):
    done = _make_venv(tmp_path, here, PIP_INDEX_URL=f"{address}/simple")
    assert set(seen) == {"GET /simple/six/"}, done.stderr


@needs_make
def test_make_says_which_python_is_missing(tmp_path):
  done = _make_venv(tmp_path, "PYTHON=python3.0", PYENV_ROOT=str(tmp_path))
  assert done.returncode == 2
  assert "error: no Python ≥ 3.11 that can make a venv (tried: python3.0)" in done.stderr


@needs_make
@pytest.mark.slow
def test_make_finds_a_python_of_pyenv_that_is_not_active(tmp_path):
  """pyenv's shim on the PATH fails for a version that is installed but not switched on."""
  programs = tmp_path / "versions" / "3.99.0" / "bin"
  programs.mkdir(parents=True)
  base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
  (programs / "python3.99").symlink_to(base)
  with _listener() as (address, _):
    environment = {"PYENV_ROOT": str(tmp_path), "PIP_INDEX_URL": address}
    done = _make_venv(tmp_path, "PYTHON=python3.99", **environment)
  assert f"with Python 3.{sys.version_info.minor}." in done.stdout, done.stderr
