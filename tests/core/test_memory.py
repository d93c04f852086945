"""Proves that freed memory stays for the next step, and is given back after a long compilation."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax.monitoring
import pytest

from llmjax.core import memory

# Runs a step that makes 64 MB on the way, and counts the pages it had to ask for.
_FAULTS = """
import resource, sys, types
if sys.argv[1] == "plain":  # the package's own __init__ tunes
  sys.modules["llmjax"] = types.ModuleType("llmjax")
  sys.modules["llmjax"].__path__ = [sys.argv[2]]
else:
  import llmjax
import jax, jax.numpy as jnp
from llmjax.core.memory import settle
step = jax.jit(lambda a, b: (a @ b) @ a)
a, b = jnp.ones((4096, 16)), jnp.ones((16, 4096))
faults = []
for _ in range(6):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  settle(step(a, b))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


class Library:
  def __init__(self):
    self.calls = []
    self.options = []
    self.malloc_trim = self.calls.append
    self.mallopt = lambda parameter, value: self.options.append((parameter, value))


@pytest.fixture
def listeners(monkeypatch):
  made = []
  monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", made.append)
  return made


def test_long_compilations_are_followed_by_giving_back(monkeypatch, listeners):
  library = Library()
  monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
  assert memory.tune_allocator()
  (listen,) = listeners
  listen("/jax/core/compile/backend_compile_duration", 0.2, fun_name="f")
  listen("/jax/core/compile/jaxpr_trace_duration", 9.0, fun_name="f")
  assert library.calls == []
  listen("/jax/core/compile/backend_compile_duration", 2.0, fun_name="f")
  assert library.calls == [0]


def test_what_the_environment_says_of_malloc_decides(monkeypatch, listeners):
  library = Library()
  monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
  memory.tune_allocator()
  assert len(library.options) == 3
  monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
  memory.tune_allocator()
  assert len(library.options) == 3


def test_other_c_libraries_are_left_alone(monkeypatch, listeners):
  monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
  assert not memory.tune_allocator()
  assert listeners == []


def test_a_step_asks_the_system_for_no_pages():
  if not hasattr(ctypes.CDLL(None), "mallopt"):
    pytest.skip("this C library has no mallopt")
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  folder = Path(memory.__file__).parent.parent
  run = lambda how: int(  # noqa: E731
    subprocess.run(
      [sys.executable, "-c", _FAULTS, how, str(folder)],
      env=environment,
      capture_output=True,
      check=True,
    ).stdout
  )
  # The product alone is 64 MB: 16,384 pages of 4 KiB, or 32 of 2 MiB where the system makes huge
  # ones by itself, of which a step without tuning asks for every one.
  assert run("tuned") < 16 <= run("plain")


def test_the_event_is_the_one_that_jax_sends(monkeypatch, listeners):
  memory.tune_allocator()
  seen = []
  monkeypatch.undo()
  listen = lambda event, duration_s, **_: seen.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x * 3 + 1)(2.0)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert memory._COMPILED in seen
