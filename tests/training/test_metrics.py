"""Proves that metrics survive being cut off: later lines are dropped, half a line is ignored."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.training import rates as rates_module
from llmjax.training.metrics import MetricsWriter, Pending, Reporter, rates, read_metrics
from llmjax.training.rates import Peak, StepClock, peak_of


def write(workdir, steps, start=0):
  writer = MetricsWriter(workdir, start)
  for step in steps:
    writer.write(step, {"loss": float(10 * step)})
  writer.close()


def steps_in(workdir):
  return [line["step"] for line in read_metrics(workdir)]


def test_lines_come_back_in_order_with_the_step_first(tmp_path):
  write(tmp_path, [1, 2, 3])
  assert read_metrics(tmp_path) == [{"step": n, "loss": 10.0 * n} for n in (1, 2, 3)]
  assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, "loss"')


def test_no_file_reads_as_no_metrics(tmp_path):
  assert read_metrics(tmp_path) == []


def test_resuming_drops_the_lines_of_later_steps(tmp_path):
  write(tmp_path, [1, 2, 3, 4, 5])
  write(tmp_path, [4, 5, 6], start=3)
  assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
  write(tmp_path, [1], start=0)
  assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_last_line_cut_short_is_ignored_and_replaced(tmp_path, cut):
  write(tmp_path, [1, 2, 3])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[: -cut - 1])
  assert steps_in(tmp_path) == [1, 2]
  write(tmp_path, [3, 4], start=2)
  assert steps_in(tmp_path) == [1, 2, 3, 4]
  for line in path.read_text().splitlines():
    json.loads(line)


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  writer = MetricsWriter(tmp_path, 0)
  writer.write(1, {"loss": 1.0})
  assert steps_in(tmp_path) == [1]
  writer.close()


def test_pending_holds_back_the_newest_and_flushes_in_order():
  pending = Pending()
  due = [pending.add(step, {"loss": jnp.float32(step)}) for step in range(1, 5)]
  assert due == [[], [], [(1, {"loss": 1.0}, None)], [(2, {"loss": 2.0}, None)]]
  assert pending.flush() == [(3, {"loss": 3.0}, None), (4, {"loss": 4.0}, None)]
  assert pending.flush() == []


PEAK = Peak(1e12, "mfu", "MFU")
TOKENS, FLOPS = 100, 2e9  # of a step


def reporter(folder, steps, every=1, done=0, **more):
  return Reporter(folder, steps, done, every, FLOPS, PEAK, **more)


def step_values(step):
  return {"loss": jnp.float32(step), "tokens": jnp.float32(TOKENS)}


@pytest.mark.parametrize(("every", "kept"), [(1, range(1, 8)), (3, [1, 3, 6, 7])])
def test_the_reporter_writes_the_steps_asked_for_and_always_first_and_last(tmp_path, every, kept):
  report = reporter(tmp_path, 7, every)
  for step in range(1, 8):
    report.add(step, step_values(step))
  report.close()
  lines = read_metrics(tmp_path)
  assert [line["step"] for line in lines] == list(kept)
  assert [line["loss"] for line in lines] == list(kept)
  assert "tokens_per_s" not in lines[0], "a first step is mostly compilation"
  for line in lines[1:]:
    assert line["mfu"] == pytest.approx(line["tokens_per_s"] / TOKENS * FLOPS / PEAK.flops)


def test_an_evaluation_is_written_after_the_steps_before_it(tmp_path):
  report = reporter(tmp_path, 3)
  for step in (1, 2):
    report.add(step, step_values(step))
  report.record(2, "evaluation", lambda: {"bits_per_byte": 1.5})
  report.close()
  lines = read_metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 2]
  assert lines[-1]["bits_per_byte"] == 1.5


class Machine:
  """A host and a device that takes steps in the order it is given them, on a clock of its own.

  The host goes on while the device works, unless `waits`, until it reads what a step made.
  """

  def __init__(self, waits: bool):
    self.now_s, self.free_s, self.waits = 0.0, 0.0, waits

  def clock(self):
    return StepClock(lambda: self.now_s, lambda values: values["loss"].end_s)

  def batches(self, late):
    for seconds in late:
      self.now_s += seconds
      yield

  def step(self, number, seconds, compile_s=0.0):
    self.now_s += compile_s
    self.free_s = max(self.free_s, self.now_s) + seconds
    if self.waits:
      self.now_s = self.free_s
    return {"loss": Loss(self, self.free_s, number), "tokens": TOKENS}

  def do(self, seconds):
    self.now_s += seconds


class Loss:
  """A step's loss, on the device until it is read."""

  def __init__(self, machine, end_s, number):
    self.machine, self.end_s, self.number = machine, end_s, number

  def __array__(self, *_, **__):
    self.machine.now_s = max(self.machine.now_s, self.end_s)
    return np.array(self.number, np.float32)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_rate_is_the_devices_and_all_other_seconds_are_told_apart(tmp_path, waits, every):
  """Steps of 2 s; a compilation of 50 s; an evaluation and a checkpoint of 30 and 7 s each fourth
  step; every sixth batch is 5 s late. None of it may show in a rate."""
  machine, steps, save = Machine(waits), 24, lambda: machine.do(7.0)
  report = reporter(tmp_path, steps, every, clock=machine.clock())
  late = [5.0 if step % 6 == 0 else 0.0 for step in range(1, steps + 1)]
  for step, _ in enumerate(report.feed(machine.batches(late)), 1):
    report.add(step, machine.step(step, 2.0, compile_s=50.0 if step == 1 else 0.0))
    if step % 4 == 0:
      report.record(step, "evaluation", lambda: machine.do(30.0) or {"bits_per_byte": 1.0})
      report.record(step, "checkpoint", save)
  report.close()
  lines = [line for line in read_metrics(tmp_path) if "steps_s" in line]
  assert {round(line["tokens_per_s"], 6) for line in lines} == {TOKENS / 2.0}
  assert {round(line["mfu"], 9) for line in lines} == {FLOPS / 2.0 / PEAK.flops}
  found = rates(tmp_path)
  assert found["tokens_per_s"] == TOKENS / 2.0 and found["mfu"] == FLOPS / 2.0 / PEAK.flops
  assert found["startup_s"] == 52.0 and found["steps_s"] == 2.0 * (steps - 1)
  assert (found["evaluation_s"], found["checkpoint_s"]) == (6 * 30.0, 6 * 7.0)
  # A device with work left works while the host waits for a batch: before steps 6 and 18 one step
  # is under way, 2 of the 5 s, before steps 12 and 24 two.
  assert found["data_wait_s"] == (20.0 if waits else 3.0 + 1.0 + 3.0 + 1.0)
  whole_s = sum(found[name] for name in found if name.endswith("_s") and "per" not in name)
  assert whole_s == pytest.approx(machine.now_s), "every second is somewhere, once"


def test_a_line_says_what_the_time_went_on(tmp_path, capsys):
  machine = Machine(True)
  report = reporter(tmp_path, 3, clock=machine.clock())
  for step, _ in enumerate(report.feed(machine.batches([0, 0, 0.5])), 1):
    report.add(step, machine.step(step, 0.004, compile_s=3.0 if step == 1 else 0.0))
  report.record(3, "checkpoint", lambda: machine.do(0.25))
  report.close()
  said = capsys.readouterr().err
  assert "25,000 tokens/s  50% MFU  (start-up 3.0 s, data 0.5 s)" in said


def test_a_run_of_one_step_has_no_rate(tmp_path):
  report = reporter(tmp_path, 1)
  report.add(1, step_values(1))
  report.close()
  assert rates(tmp_path)["tokens_per_s"] is None and rates(tmp_path)["startup_s"] > 0


@pytest.mark.parametrize(
  ("kind", "tflops"),  # a device's, by the makers' pages: a v4 chip is one device to newer jax
  [
    ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918),
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-40GB", 312),
  ],
)
def test_an_accelerators_peak_is_the_published_one_and_its_share_is_mfu(kind, tflops, monkeypatch):
  device = types.SimpleNamespace(platform="tpu", device_kind=kind)
  monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  peak = peak_of("bfloat16")
  assert (peak.flops, peak.key, peak.words) == (4 * tflops * 1e12, "mfu", "MFU")


def test_a_cpus_peak_is_measured_and_called_so():
  peak = peak_of("float32")
  assert peak.key == "matmul_share" and peak.words == "of measured matmul peak" and peak.flops > 0


def test_a_chip_of_no_table_is_said(monkeypatch, capsys):
  device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 PCIe")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  monkeypatch.setattr(rates_module, "matmul_peak_flops", lambda dtype: 5.0)
  assert peak_of("bfloat16").key == "matmul_share"
  assert "no peak of 'NVIDIA H100 PCIe' is known" in capsys.readouterr().err
