"""Formulas against thirty programs that the TPU's compiler made, and against this CPU."""

import json
import math

import pytest

from tests.planning import plan_table
from tests.planning.test_plan import needs_compiler

ROWS = [json.loads(line) for line in plan_table.ROWS.read_text().splitlines()]
# Of a pipeline the program's FLOPs are those of the longest branch in every tick, bubbles included;
# the products of Muon's own update are not counted.
NOT_COUNTED = ("mesh.stage", "optim.kind=muon")


@pytest.mark.parametrize(
  "row",
  [pytest.param(row, marks=[pytest.mark.slow] * (i % 6 != 0)) for i, row in enumerate(ROWS)],
  ids=lambda row: f"{row['topology']} {row['config']}"[:60],
)
def test_traces_and_shardings_agree_with_what_the_compiler_said(row):
  planned = plan_table.planned_row(row)
  if not any(name in row["config"] for name in NOT_COUNTED):
    assert planned["flops_ratio"] == pytest.approx(1, abs=0.03)
  # What lives at once is the compiler's choice.
  assert planned["bytes_ratio"] == pytest.approx(1, abs=0.15)


def test_every_case_was_compiled():
  assert [(row["topology"], row["config"]) for row in ROWS] == list(plan_table.CASES)


def test_there_are_thirty_different_cases():
  assert len(set(plan_table.CASES)) == len(plan_table.CASES) == 30


@needs_compiler
def test_a_case_is_compiled_as_it_was_when_the_formulas_were_fitted(tmp_path, monkeypatch):
  """The programs change as llmjax does: FLOPs hardly, the peak by less than the formulas err."""
  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path))
  row = plan_table.compiled_row(*plan_table.CASES[0])
  assert row["program_tflops"] == pytest.approx(ROWS[0]["program_tflops"], rel=0.01)
  assert row["program_bytes"] == pytest.approx(ROWS[0]["program_bytes"], rel=0.05)


def test_what_is_compiled_is_kept(tmp_path, monkeypatch, capsys):
  compiled = []

  def fake(where, changes):
    compiled.append((where, changes))
    if len(compiled) == 3:
      raise KeyboardInterrupt
    return {
      "topology": where, "config": changes, "program_tflops": 1.0, "program_bytes": 2**30,
      "compile_s": 1.0,
    }

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(plan_table, "CASES", plan_table.CASES[:4])
  monkeypatch.setattr(plan_table, "compiled_row", fake)
  monkeypatch.setattr(plan_table, "cpu_rows", lambda rounds: [{"config": "x", "rounds": rounds}])
  (tmp_path / "docs").mkdir()
  with pytest.raises(KeyboardInterrupt):
    plan_table.main()
  plan_table.main(7)
  assert compiled == [*plan_table.CASES[:3], *plan_table.CASES[2:]]
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["config"] for row in rows] == [*(c for _, c in plan_table.CASES), "x"]
  assert rows[-1]["rounds"] == 7
  assert (tmp_path / plan_table.PICTURE).stat().st_size > 10_000


def test_a_cpu_case_is_planned_set_aside_used_and_timed(monkeypatch):
  case = "layers=2 width=64 heads=2 mlp_width=96 vocab_size=256 max_seq_len=64"
  monkeypatch.setattr(plan_table, "CPU_CASES", (case,))
  (row,) = plan_table.cpu_rows(2)
  assert row["formula_bytes"] > 12 * 2 * (4 * 64**2 + 3 * 64 * 96)  # state alone is more
  # Both count the same arrays; which of them live at once is the compiler's choice.
  assert row["program_bytes"] / 3 < row["formula_bytes"] < 3 * row["program_bytes"]
  assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("formula_s", "seconds_per_step"))
