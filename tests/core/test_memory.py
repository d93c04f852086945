"""Proves that a long compilation makes the allocator give its free pages back, a short one not."""

import ctypes

import jax.monitoring
import pytest

from llmjax.core import memory


class Library:
  def __init__(self):
    self.calls = []
    self.malloc_trim = self.calls.append


@pytest.fixture
def listeners(monkeypatch):
  made = []
  monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", made.append)
  return made


def test_long_compilations_are_followed_by_giving_back(monkeypatch, listeners):
  library = Library()
  monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
  assert memory.give_back_after_compiling()
  (listen,) = listeners
  listen("/jax/core/compile/backend_compile_duration", 0.2, fun_name="f")
  listen("/jax/core/compile/jaxpr_trace_duration", 9.0, fun_name="f")
  assert library.calls == []
  listen("/jax/core/compile/backend_compile_duration", 2.0, fun_name="f")
  assert library.calls == [0]


def test_other_c_libraries_are_left_alone(monkeypatch, listeners):
  monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
  assert not memory.give_back_after_compiling()
  assert listeners == []


def test_the_event_is_the_one_that_jax_sends(monkeypatch, listeners):
  memory.give_back_after_compiling()
  seen = []
  monkeypatch.undo()
  listen = lambda event, duration_s, **_: seen.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x * 3 + 1)(2.0)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert memory._COMPILED in seen
