"""The bench of plans: its cases are sound, and it goes on where it was stopped."""

import math
from types import SimpleNamespace

import jax
import pytest

from llmjax.bench import plan_cpu, plan_table
from llmjax.core.chips import topology
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.parallel.mesh import AXES, axis_sizes
from llmjax.parallel.rules import weight_shardings
from llmjax.training.step import compile_step


@pytest.mark.parametrize("case", plan_table.CASES, ids=lambda case: f"{case[0]} {case[1]}"[:60])
def test_every_case_fits_its_topology(case):
  where, changes = case
  config, chips = plan_table.config_of(changes), topology(where)
  sizes = axis_sizes(config.mesh, chips.devices)
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
  weight_shardings(mesh, abstract(config.model))
  compile_step(config, mesh)  # refuses rows and positions that do not divide
  row = {"topology": where, "config": changes, "program_tflops": 1.0, "program_bytes": 2**30}
  planned = plan_table.planned_row(row)
  assert 0.1 < planned["formula_tflops"] < 1000
  assert planned["formula_bytes"] < chips.chip.hbm_bytes, "would not fit"


def test_there_are_thirty_different_cases():
  assert len(set(plan_table.CASES)) == len(plan_table.CASES) == 30


def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
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
  monkeypatch.setattr(plan_table, "compiled_row", fake)
  monkeypatch.setattr(plan_table, "cpu_rows", lambda rounds: [{"config": "x", "rounds": rounds}])
  options = SimpleNamespace(rounds=7)
  with pytest.raises(UserError, match="no folder docs here"):
    plan_table.measure(options)
  (tmp_path / "docs").mkdir()
  with pytest.raises(KeyboardInterrupt):
    plan_table.measure(options)
  made = plan_table.measure(options)
  assert compiled == [*plan_table.CASES[:3], *plan_table.CASES[2:]]
  assert [row["config"] for row in made["cases"][0]["rows"]] == [c for _, c in plan_table.CASES]
  assert made["cases"][1]["rows"][0]["rounds"] == 7
  assert (tmp_path / plan_table.PICTURE).stat().st_size > 10_000


def test_a_cpu_case_is_planned_set_aside_used_and_timed(monkeypatch):
  monkeypatch.setattr(
    plan_cpu, "CASES", ("layers=2 width=64 heads=2 mlp_width=96 vocab_size=256 max_seq_len=64",)
  )
  (row,) = plan_cpu.cpu_rows(2)
  assert row["formula_bytes"] > 12 * 2 * (4 * 64**2 + 3 * 64 * 96)  # state alone is more
  # Both count the same arrays; which of them live at once is the compiler's choice.
  assert row["program_bytes"] / 3 < row["formula_bytes"] < 3 * row["program_bytes"]
  assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("formula_s", "seconds_per_step"))
