"""Proves that a run whose numbers are not finite stops, says where, and keeps what was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.core.errors import RunFailed
from llmjax.data.pack import PackedRows
from llmjax.data.prepare import prepare
from llmjax.data.sources import read_sources
from llmjax.eval.loss import evaluate_loss
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.text.raw import Bytes
from llmjax.training import loop
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.finite import NotFinite, Watch
from llmjax.training.metrics import read_metrics
from llmjax.training.parameters import TrainState
from llmjax.training.stored import load_model
from tests.runs import write_text

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def store(text, tmp_path_factory):
  return prepare(read_sources(str(text)), Bytes(), tmp_path_factory.mktemp("store"))


def test_a_run_stops_at_what_is_not_finite_and_keeps_the_checkpoints_before(
  text, tmp_path, monkeypatch, capsys
):
  config = tmp_path / "config.py"
  config.write_text(
    "from pathlib import Path\nfrom tests.runs import tiny_values\n"
    f"def get_config():\n  return tiny_values(Path({str(text)!r}))\n"
  )
  feed = loop.batches

  def spoiled(*args, **options):
    for step, batch in enumerate(feed(*args, **options), 1):
      nan = batch.loss_mask_bt.at[2, 3].set(jnp.nan)
      yield dataclasses.replace(batch, loss_mask_bt=nan) if step == 6 else batch

  monkeypatch.setattr(loop, "batches", spoiled)
  workdir = tmp_path / "run"
  argv = ["train", f"--config={config}", f"--workdir={workdir}", "--config.checkpoint.every=2"]
  assert main([*argv, "--json"]) == 1
  captured = capsys.readouterr()
  said = captured.err.splitlines()[-1]
  assert captured.out == "" and "Traceback" not in captured.err
  start = "llmjax: failed: step 6: the loss is nan and the gradient norm is nan on rows 40 to 47 of"
  assert said.startswith(start) and ".txt" in said
  assert said.endswith("the checkpoint of step 4 stands")
  assert not (workdir / "result.json").exists()
  assert [line["step"] for line in read_metrics(workdir) if "loss" in line] == list(range(1, 6))
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
  parameters = load_model(workdir)[0].parameters
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))


def test_what_is_not_finite_is_told_when_later_steps_are_under_way(store):
  rows = PackedRows(store, 32, seed=0)
  watch = Watch(rows, 3, "document {}".format)
  values = {"loss": jnp.float32(2), "grad_norm": jnp.float32(1), "tokens": jnp.float32(96)}
  for step in (1, 2, 3):
    watch.add(step, values)
  watch.add(4, values | {"grad_norm": jnp.float32(jnp.inf)})
  watch.add(5, values)
  said = r"step 4: the gradient norm is inf on rows 9 to 11"
  with pytest.raises(NotFinite, match=said) as caught:
    watch.add(6, values)
  assert caught.value.step == 4
  ids = [rows[row] for row in (9, 10, 11)]  # which documents these rows are cut from, by their text
  texts = [store[i].tobytes() for i in range(len(store))]
  pieces = [
    tokens[segments == number].tobytes()
    for tokens, segments in ids for number in range(1, segments.max() + 1)
  ]
  found = [i for piece in pieces for i, whole in enumerate(texts) if piece in whole]
  assert len(found) == len(pieces), "a piece stands in one document alone"
  named = str(caught.value).partition("documents ")[2]
  assert named.startswith(", ".join(f"document {i}" for i in dict.fromkeys(found)))


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
  """A step's loss and gradient may be finite and what the learning rate makes of them not."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  good = {"up_df": jnp.ones((2, 3)), "half_d": jnp.ones(2, jnp.bfloat16)}
  bad = good | {"half_d": jnp.array([1, jnp.inf], jnp.bfloat16)}
  count = {"count": jnp.int32(7)}
  checkpoints.save(TrainState(jnp.int32(1), good, {}, count), {})
  with pytest.raises(RunFailed, match="step 2 left model half_d with values that are not finite"):
    checkpoints.save(TrainState(jnp.int32(2), bad, {}, count), {})
  with pytest.raises(RunFailed, match="step 3 left optimizer half_d with"):
    checkpoints.save(TrainState(jnp.int32(3), good, {}, bad), {})
  assert checkpoints.standing() == "the checkpoint of step 1 stands"
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
  assert Checkpoints(tmp_path / "new", keep=2).standing() == "there is no checkpoint yet"


def test_a_held_out_loss_that_is_not_finite_is_told(tiny_decoder, store):
  broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tiny_decoder)
  with pytest.raises(RunFailed, match=r"the held-out loss is nan in batch 1 of"):
    evaluate_loss(broken, store, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
