"""A run with QLoRA leaves on a 2×2×2 mesh: trained, resumed on another mesh, evaluated on all."""

import json
import shutil

import jax
import pytest

import llmjax
from llmjax.training.metrics import read_metrics
from llmjax.training.stored import load_model
from tests.runs import tiny, write_text

MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
QLORA = {"kind": "lora", "rank": 3, "base": {"kind": "nf4", "block": 8}}
ADAPTED = {"model__weights": (("*/mlp/*", QLORA),)}  # codes and adapters move between meshes too


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(text, workdir, result) of 12 steps on the mesh."""
  folder = tmp_path_factory.mktemp("mesh")
  text = write_text(folder / "text")
  workdir = folder / "run"
  return text, workdir, llmjax.train(tiny(text, **MESH, **ADAPTED), workdir)


def _losses(workdir):
  return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


@pytest.mark.slow
def test_a_run_on_a_mesh_is_the_run_on_one_axis(run, tmp_path):
  text, workdir, result = run
  made = llmjax.train(tiny(text, **ADAPTED), tmp_path / "data8")
  # fp32 sums in another order, over 12 steps of Adam at a high rate.
  assert _losses(tmp_path / "data8") == pytest.approx(_losses(workdir), rel=1e-3)
  assert made["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=2e-3)


OTHERS = (
  pytest.param({"mesh__data": 1, "mesh__fsdp": 8}, marks=pytest.mark.slow),
  {"mesh__data": 1, "mesh__stage": 2, "mesh__context": 2, "mesh__tensor": 2},
)


@pytest.mark.parametrize("other", OTHERS, ids=["fsdp", "stage-context-tensor"])
def test_a_checkpoint_goes_on_on_another_mesh_with_the_same_data(other, run, tmp_path):
  text, workdir, result = run
  shutil.copytree(workdir, tmp_path / "moved")
  shutil.rmtree(tmp_path / "moved/checkpoints/12")
  made = llmjax.train(tiny(text, **other, **ADAPTED), tmp_path / "moved")
  assert _losses(tmp_path / "moved") == pytest.approx(_losses(workdir), rel=1e-4)
  assert made["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-4)


def test_eval_and_load_use_what_devices_there_are(run):
  _, workdir, result = run
  assert llmjax.evaluate(workdir)["bits_per_byte"] == pytest.approx(
    result["bits_per_byte"], rel=1e-5
  )
  model, meta = load_model(workdir)
  assert meta["step"] == 12
  assert {leaf.sharding.device_set.pop() for leaf in jax.tree.leaves(model.parameters)} == {
    jax.devices()[0]
  }
  assert json.loads((workdir / "result.json").read_text())["steps"] == 12
