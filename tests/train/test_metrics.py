"""Proves that metrics survive being cut off: later lines are dropped, half a line is ignored."""

import json

import jax.numpy as jnp
import pytest

from llmjax.train.metrics import MetricsWriter, Pending, Reporter, read_metrics


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
  pending = Pending(depth=2)
  due = [pending.add(step, {"loss": jnp.float32(step)}) for step in range(1, 5)]
  assert due == [[], [], [(1, {"loss": 1.0})], [(2, {"loss": 2.0})]]
  assert pending.flush() == [(3, {"loss": 3.0}), (4, {"loss": 4.0})]
  assert pending.flush() == []


@pytest.mark.parametrize(("every", "done", "kept"), [(1, 0, range(1, 8)), (3, 0, [1, 3, 6, 7])])
def test_the_reporter_writes_the_steps_asked_for_and_always_first_and_last(
  tmp_path, every, done, kept
):
  report = Reporter(tmp_path, 7, done, every, flops_per_token=1e6, peak_flops=1e12)
  for step in range(1, 8):
    report.add(step, {"loss": jnp.float32(step), "tokens": jnp.float32(100)})
  report.close()
  lines = read_metrics(tmp_path)
  assert [line["step"] for line in lines] == list(kept)
  assert [line["loss"] for line in lines] == list(kept)
  for line in lines:
    assert line["utilization"] == pytest.approx(line["tokens_per_s"] * 1e-6)


def test_an_evaluation_is_written_after_the_steps_before_it(tmp_path):
  report = Reporter(tmp_path, 3, 0, 1, flops_per_token=1.0, peak_flops=1.0)
  for step in (1, 2):
    report.add(step, {"loss": jnp.float32(step), "tokens": jnp.float32(100)})
  report.write(2, {"bits_per_byte": 1.5})
  report.close()
  lines = read_metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 2]
  assert lines[-1]["bits_per_byte"] == 1.5
