"""`llmjax check` passes what is right and names the leaf of what is wrong: four bugs put in."""

import dataclasses
import functools
import json

import jax
import pytest

from llmjax import cli
from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.nn import norm
from llmjax.nn.attention import ring
from llmjax.parallel import rules
from llmjax.training import check as checks
from llmjax.training.check import on_one_device
from llmjax.training.config import Config
from llmjax.training.shrink import made_up_batch, shrink
from tests.multidevice.test_step import BASE


def config() -> Config:
  values = (
    *BASE, "train.grad_accum_steps=1", "model.layers=1", "model.attention.window=0",
    "model.attention.pattern=('full',)", "model.remat=none", "model.attention.sinks=True",
  )
  values = dict(value.split("=", 1) for value in values)  # given twice, tuples add up
  return override(Config(), [f"--config.{key}={value}" for key, value in values.items()])


def row(sizes) -> dict:
  return checks.check(config(), 8, [sizes])["meshes"][0]


@functools.cache
def truth(config):
  """What one device makes of a config: the bugs below are those of meshes alone."""
  return on_one_device(config, made_up_batch(config))


@pytest.fixture(autouse=True)
def one_truth(monkeypatch):
  monkeypatch.setattr(checks, "on_one_device", lambda config, batch: truth(config))


CUT = {"context": 4, "data": 2}


def test_a_mask_off_by_one_at_a_shard_border_is_caught(monkeypatch):
  right = ring._ChunkOrder.needed

  def needed(self, query_id, key_id):
    return right(self, query_id, key_id) & (key_id != query_id - 1)

  monkeypatch.setattr(ring._ChunkOrder, "needed", needed)
  found = row(CUT)
  assert not found["ok"] and found["loss_diff"] > 1e-4


def test_a_missing_psum_is_caught_and_its_leaf_named(monkeypatch):
  assert row(CUT)["ok"]
  monkeypatch.setattr(ring.jax.lax, "psum", lambda x, axis: x)
  found = row(CUT)
  assert not found["ok"] and "sinks_n" in found["worst_leaf"]


def test_a_doubled_gradient_is_caught(monkeypatch):
  right = rules.constrain

  def doubled(weights, table):  # as if a sum over fsdp were taken twice
    twice = 1 if jax.sharding.get_abstract_mesh().empty else 2
    return jax.tree.map(lambda leaf: twice * leaf, right(weights, table))

  monkeypatch.setattr(rules, "constrain", doubled)
  found = row({"data": 2, "fsdp": 4})
  assert not found["ok"] and found["worst_rel"] > 0.5


def test_an_unmatched_rule_is_an_error_that_names_it(monkeypatch):
  for letter in [letter for letter, axis in rules.WEIGHTS.items() if axis == "tensor"]:
    monkeypatch.delitem(rules.WEIGHTS, letter)
  found = row({"tensor": 4, "data": 2})
  assert not found["ok"] and "mesh axis tensor 4 shards no weight" in found["error"]


def test_an_activation_that_lives_whole_is_an_error_that_names_its_line(monkeypatch):
  right = norm.Norm.__call__

  def whole(self, x_btd):
    made = right(self, x_btd)
    if jax.sharding.get_abstract_mesh().empty:
      return made
    return jax.lax.with_sharding_constraint(made, jax.sharding.PartitionSpec())

  mesh = {"data": 2, "fsdp": 2, "expert": 2}
  monkeypatch.setattr(norm.Norm, "__call__", whole)
  found = row(mesh)
  assert not found["ok"]
  assert "f32[16,64,64]" in found["error"] and "b → data, fsdp, expert" in found["error"]
  assert "/test_check.py:" in found["error"]


def test_a_leaf_that_is_out_is_named_and_the_status_is_1(tmp_path, capsys, monkeypatch):
  path = tmp_path / "config.py"
  path.write_text("from llmjax import Config, defaults\nget_config = lambda: defaults(Config)\n")
  row = {"mesh": {"data": 8}, "loss_diff": 0.0, "worst_leaf": "a/up_df", "worst_rel": 1.0}
  row |= {"peak_bytes": 1, "collectives": "", "ok": False}
  result = {"meshes": [row], "ok": False, "equal": 0, "off": 1, "left_out": 0}
  monkeypatch.setattr(checks, "check", lambda *_: result)
  assert cli.main(["check", f"--config={path}", "--json"]) == 1
  out, error = capsys.readouterr()
  assert "check failed: data 8" in error and "1.0e+00 a/up_df" in error
  assert json.loads(out.splitlines()[-1])["ok"] is False


def only_rows(monkeypatch):
  """Every mesh that can run gives what one device gave: a step of another config."""
  seen = dataclasses.replace(truth(shrink(config(), 8)), peak_bytes=1)
  monkeypatch.setattr(checks, "on_mesh", lambda *_, **__: seen)
  monkeypatch.setattr(checks, "on_one_device", lambda *_: seen)


def test_a_mesh_that_cannot_run_proves_nothing_and_is_counted_apart(monkeypatch):
  small = override(config(), ["--config.model.kv_heads=2", "--config.model.heads=4"])
  only_rows(monkeypatch)
  meshes = [{"data": 8}, {"tensor": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}]
  found = checks.check(small, 8, meshes)
  # Four devices share two key heads, but eight have no query head each.
  assert [row["ok"] for row in found["meshes"]] == [True, None, True, True]
  assert "has 4 query heads ('n'), which mesh tensor 8" in found["meshes"][1]["error"]
  assert (found["ok"], found["equal"], found["off"], found["left_out"]) == (True, 3, 0, 1)
  assert "3 of 4 meshes equal one device, 0 are off, 1 cannot run" in checks.summary(found)
  with pytest.raises(UserError, match="none of 1 meshes can run this config"):
    checks.check(small, 8, [{"tensor": 8}])


def test_the_command_prints_a_table_and_one_object(tmp_path, capsys, monkeypatch):
  only_rows(monkeypatch)
  path = tmp_path / "config.py"
  path.write_text(
    "from llmjax.core.config import defaults\n"
    "from llmjax.training.config import Config\n\n\n"
    "def get_config():\n  return defaults(Config)\n"
  )
  small = ["--config.model.layers=2", "--config.model.heads=2", "--config.model.kv_heads=2"]
  command = ["check", f"--config={path}", "--devices=2", "--json", *small]
  assert cli.main(command) == 0
  out, _ = capsys.readouterr()
  *table, counts, last = out.strip().splitlines()
  assert counts.startswith("6 of 6 meshes equal one device")
  result = json.loads(last)
  assert result["ok"] and len(result["meshes"]) == len(table) == 6
  assert {tuple(row["mesh"].items()) for row in result["meshes"]} == {
    ((axis, 2),) for axis in ("data", "fsdp", "stage", "context", "expert", "tensor")
  }
  assert all(row["worst_rel"] < 1e-5 and row["peak_bytes"] > 0 for row in result["meshes"])
  assert cli.main(["check", f"--config={path}", "--devices=1"]) == 2
  assert cli.main(["check", f"--config={path}", "--meshes=most"]) == 2
