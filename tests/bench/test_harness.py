"""Workers: a process each, one line a question, taken in turn, told when they die."""

import contextlib
import os
from pathlib import Path

import pytest

from llmjax.bench.workers import Spec, Worker, WorkerError, interleave

ROOT = str(Path(__file__).parents[2])


def worker(function="prepare", **environment):
  spec = Spec(f"tests.bench.fake:{function}", "tiny", "float32", "nowhere", 3)
  return Worker("fake", spec, {"PYTHONPATH": ROOT, **environment})


def test_a_worker_prepares_answers_and_ends():
  with contextlib.closing(worker(GIVEN="yes")) as fake:
    assert fake.facts["first_loss"] == 1.0 and fake.facts["pid"] != os.getpid()
    assert fake.facts["first_step_s"] >= 0 and fake.facts["import_s"] >= 0
    first, second = fake.ask({"number": 7}), fake.ask({"number": 8})
  assert (first["order"], second["order"]) == ([7], [7, 8])
  assert first["size"] == "tiny" and first["threads"] == "3" and first["given"] == "yes"
  with pytest.raises(ProcessLookupError):
    os.kill(fake.facts["pid"], 0)


def test_a_peer_is_not_charged_with_jax():
  with contextlib.closing(worker()) as fake:
    answer = fake.ask({"number": 1})
  assert not answer["jax"]
  # A bare Python with numpy needs some 30 MB; this process, whose peak a child would inherit
  # through ru_maxrss, has loaded jax and needs several times that.
  assert 5e6 < answer["peak_bytes"] < 120e6


def test_a_death_is_told_with_its_last_words():
  with pytest.raises(WorkerError, match=r"fake ended with status 1: ValueError: no such .* tiny"):
    worker("fails")
  with contextlib.closing(worker("dies")) as fake:
    with pytest.raises(WorkerError, match="status 3: out of patience"):
      fake.ask({"number": 1})
    with pytest.raises(WorkerError):
      fake.ask({"number": 2})


class Recorder:
  """Stands for a worker; keeps who was asked what."""

  def __init__(self, name, asked):
    self.name, self.asked = name, asked

  def ask(self, request):
    """Notes the question."""
    self.asked.append((self.name, request["batch"]))
    return {"tokens_per_s": len(self.asked)}


def test_rounds_go_there_and_back():
  asked = []
  workers = {name: Recorder(name, asked) for name in "ab"}
  made = interleave(workers, [{"batch": 1}, {"batch": 8}], rounds=3)
  there = [("a", 1), ("a", 8), ("b", 1), ("b", 8)]
  back = [("b", 1), ("b", 8), ("a", 1), ("a", 8)]
  assert asked == [*there, *back, *there]
  assert [answer["tokens_per_s"] for answer in made["b"][0]] == [3, 5, 11]
