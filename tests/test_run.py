"""The quickstart, shrunk: one config becomes a trained, resumed, evaluated, sampled model."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

import llmjax
from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.loop import Interrupted
from llmjax.training.metrics import read_metrics
from llmjax.training.parameters import abstract_state
from llmjax.training.stored import load_model, read_meta
from tests.reference.optim import schedule
from tests.runs import tiny, write_text

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
  """A whole run, never interrupted: (workdir, config, result)."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  config = tiny(text, eval__every=6, sample__prompts=("ka", "lo mi"))
  return workdir, config, llmjax.train(config, workdir)


def _state(workdir, config):
  """The newest training state in a workdir, as numpy by path."""
  model = load_model(workdir)[0].config
  like = abstract_state(dataclasses.replace(config, model=model), make_mesh(MeshConfig()))
  checkpoints = Checkpoints(workdir, 2)
  state, meta = checkpoints.restore(like)
  checkpoints.close()
  return {path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()}, meta


def _losses(workdir):
  return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


def test_a_run_leaves_all_it_promises(finished):
  workdir, _config, result = finished
  wanted = {
    "bits_per_byte",
    "gzip_bits_per_byte",
    "xz_bits_per_byte",
    "train_seconds",
    "tokens_per_s",
    "matmul_share",
    "startup_s",
    "steps_s",
    "evaluation_s",
    "checkpoint_s",
    "data_wait_s",
    "steps",
    "parameters",
  }
  assert wanted <= result.keys()
  assert json.loads((workdir / "result.json").read_text()) == result
  assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert (workdir / "samples.txt").read_text().count("--- prompt:") == 2
  page = (workdir / "report.html").read_text()
  assert "12 steps, finished" in page and f"{result['bits_per_byte']:.4g}" in page
  whole = [row for row in json.loads((workdir / "data.json").read_text()) if row["source"] == "all"]
  assert [row["documents"] for row in whole] == [12, 12], "of so few, each one's end is held out"
  assert whole[1]["bytes"] == result["bytes"]
  assert whole[1]["tokens"] == result["tokens"] + whole[1]["documents"], "each BOS is given"
  assert list((workdir / "tensorboard").iterdir())
  lines = read_metrics(workdir)
  steps = [line for line in lines if "loss" in line]
  assert [line["step"] for line in steps] == list(range(1, 13))
  assert all(line["tokens_per_s"] > 0 for line in steps[1:])
  assert [line["step"] for line in lines if "bits_per_byte" in line] == [6]
  assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "it learns"
  assert result["steps"] == 12
  fits = result["tokenizer"]
  assert fits["exact_rate"] == 1 and fits["unknown_rate"] == 0
  assert fits["bytes"] == result["bytes"] and 1 < fits["bytes_per_token"] < 10
  assert result["parameters"] == sum(
    leaf.size for leaf in jax.tree.leaves(load_model(workdir)[0].parameters)
  )


def test_a_checkpoint_can_be_moved_and_tells_its_whole_story(finished, tmp_path):
  workdir, config, _ = finished
  shutil.copytree(workdir / "checkpoints" / "12", tmp_path / "moved")
  meta = read_meta(tmp_path / "moved")
  assert meta["step"] == 12 and meta["seed"] == config.seed
  assert meta["config"]["model"]["width"] == 32
  assert len(meta["config_hash"]) == 16 and len(meta["data_key"]) == 16
  model = llmjax.load(tmp_path / "moved")
  assert model.tokenizer.decode(model.tokenizer.encode("ka lo")) == "ka lo"
  rows = np.arange(20).reshape(2, 10)
  np.testing.assert_array_equal(model.logits(rows), llmjax.load(workdir).logits(rows))


def test_eval_of_a_checkpoint_is_what_the_run_said_and_writes_nothing(finished, capsys):
  workdir, _, result = finished
  before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
  again = llmjax.evaluate(workdir)
  assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before
  first, last = capsys.readouterr().err.splitlines()
  assert first.startswith(f"scoring {result['bytes']:,} bytes, {result['tokens']:,} tokens (docu")
  assert first.endswith(" FLOPs")
  assert last.startswith("positions ") and last.endswith(" nats per token  0 s left")
  for name in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "tokens", "bytes"):
    assert again[name] == pytest.approx(result[name], rel=1e-6), name


def test_eval_on_other_text(finished, tmp_path):
  workdir, _, _ = finished
  (tmp_path / "other.txt").write_text("ka lo mi ne ru " * 40)
  scores = llmjax.evaluate(workdir, [f"--config.data.sources={tmp_path}"])
  assert scores["bytes"] == 15 * 40


def test_eval_says_when_the_text_is_no_longer_that_of_the_run(text, tmp_path, capsys):
  shutil.copytree(text, tmp_path / "text")
  llmjax.train(tiny(tmp_path / "text", steps=2), tmp_path / "run")
  capsys.readouterr()
  llmjax.evaluate(tmp_path / "run")
  assert "warning" not in capsys.readouterr().err
  (tmp_path / "text/00.txt").write_text("ka lo mi ne ru " * 60)
  llmjax.evaluate(tmp_path / "run")
  assert "has changed since this run was trained" in capsys.readouterr().err


def test_an_interrupted_run_resumes_bit_for_bit(finished, text, tmp_path, monkeypatch):
  workdir, config, result = finished
  from llmjax.training import loop

  class Press(loop.Reporter):
    """Presses Ctrl-C while step 6, which no checkpoint is due at, is under way."""

    def add(self, step, values):
      super().add(step, values)
      if step == 6:
        signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(loop, "Reporter", Press)
  with pytest.raises(Interrupted, match="after step 6 of 12"):
    llmjax.train(config, tmp_path / "cut")
  monkeypatch.undo()
  steps = [line["step"] for line in read_metrics(tmp_path / "cut") if "loss" in line]
  assert steps == list(range(1, 7))
  assert "step 6 of 12" in (tmp_path / "cut/report.html").read_text()
  resumed = llmjax.train(config, tmp_path / "cut")
  assert resumed["bits_per_byte"] == result["bits_per_byte"]
  assert (tmp_path / "cut/samples.txt").read_text() == (workdir / "samples.txt").read_text()
  whole, _ = _state(workdir, config)
  cut, meta = _state(tmp_path / "cut", config)
  assert meta["step"] == 12
  for path, leaf in whole.items():
    np.testing.assert_array_equal(cut[path], leaf, err_msg=path)
  assert _losses(workdir) == _losses(tmp_path / "cut")


def test_a_decay_branches_off_a_stable_checkpoint_as_in_one_run(text, tmp_path, capsys):
  stable = {"optim__schedule": "constant", "sample__max_tokens": 1}
  llmjax.train(tiny(text, 8, **stable), tmp_path / "stable")
  shutil.copytree(tmp_path / "stable", tmp_path / "branch")
  late = tiny(text, 10, **stable | {"optim__schedule": "wsd:decay=3"})
  with pytest.raises(UserError, match=r"decay of 3 steps does not fit into the 2 steps .* step 8,"):
    llmjax.train(late, tmp_path / "branch")
  decayed = tiny(text, 12, **stable | {"optim__schedule": "wsd:decay=4"})
  llmjax.train(decayed, tmp_path / "branch")
  said = capsys.readouterr().err
  assert "optim.schedule was constant and is now wsd:decay=4" in said
  assert "train.steps was 8 and is now 12" in said and "going on from step 8" in said
  llmjax.train(decayed, tmp_path / "whole")
  branch, _ = _state(tmp_path / "branch", decayed)
  for path, leaf in _state(tmp_path / "whole", decayed)[0].items():
    np.testing.assert_array_equal(branch[path], leaf, err_msg=path)
  rates = [line["learning_rate"] for line in read_metrics(tmp_path / "branch") if "loss" in line]
  expected = [schedule("wsd 4 sqrt", u, 1e-2, 4, 12, 0.1) for u in range(1, 13)]
  assert rates == pytest.approx(expected, rel=1e-5)


def test_the_same_command_again_does_nothing_new(finished):
  workdir, config, result = finished
  again = llmjax.train(config, workdir)
  assert again["bits_per_byte"] == result["bits_per_byte"]
  assert again["train_seconds"] == pytest.approx(result["train_seconds"], abs=1)
  assert again["tokens_per_s"] == result["tokens_per_s"]
  assert len([m for m in read_metrics(workdir) if "loss" in m]) == 12


def test_a_truncated_checkpoint_gives_way_to_the_one_before_loudly(finished, tmp_path, capsys):
  workdir, config, result = finished
  shutil.copytree(workdir, tmp_path / "run")
  files = [p for p in (tmp_path / "run/checkpoints/12/model").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  _model, meta = load_model(tmp_path / "run")
  assert meta["step"] == 8
  assert "checkpoints/12 cannot be read" in capsys.readouterr().err
  again = llmjax.train(config, tmp_path / "run")
  err = capsys.readouterr().err
  assert "checkpoints/12 cannot be read" in err and "going on from step 8" in err
  assert again["bits_per_byte"] == result["bits_per_byte"]
  assert load_model(tmp_path / "run")[1]["step"] == 12
  assert [p.name for p in (tmp_path / "run/damaged").iterdir()] == ["12-0"], "nothing is lost"


@pytest.mark.parametrize("damage", ["empty", "missing"])
def test_every_file_of_a_checkpoint_is_missed_when_it_is_damaged(
  damage, finished, tmp_path, capsys
):
  workdir, config, _ = finished
  whole, _ = _state(workdir, config)
  source = workdir / "checkpoints" / "12"
  for path in sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file()):
    target = tmp_path / "run"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(workdir, target)
    hit = target / "checkpoints" / "12" / path
    hit.unlink() if damage == "missing" else hit.write_bytes(b"")
    state, meta = _state(target, config)
    # Either the file held nothing that is read, or the checkpoint before is used: never garbage.
    assert meta["step"] in (8, 12), path
    if meta["step"] == 12:
      for name, leaf in whole.items():
        np.testing.assert_array_equal(state[name], leaf, err_msg=f"{path} {name}")


def test_no_readable_checkpoint_is_an_error_and_stays_on_disk(finished, tmp_path):
  workdir, config, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  for meta in (tmp_path / "run/checkpoints").rglob("meta/metadata"):
    meta.write_text("")
  with pytest.raises(UserError, match=r"none of the.* checkpoints"):
    llmjax.train(config, tmp_path / "run")
  with pytest.raises(UserError, match=r"none of the.* checkpoints"):
    llmjax.load(tmp_path / "run")
  assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_a_checkpoint_holds_the_step_it_says_though_buffers_are_donated(text, tmp_path):
  """Orbax writes in the background while the next step reuses the state's memory."""
  wide = {"model__width": 256, "model__mlp_width": 1024, "checkpoint__every": 1, "train__steps": 4}
  wide |= {"optim__warmup": 2}
  config = tiny(text, **{**wide, "checkpoint__keep": 4})
  llmjax.train(config, tmp_path / "run")
  kept = {}
  for step in (1, 2, 3):
    kept[step] = load_model(tmp_path / "run" / "checkpoints" / str(step))[0].parameters
  for step in (1, 2, 3):
    alone = tmp_path / f"alone{step}"
    shutil.copytree(tmp_path / "run", alone)
    for later in range(step + 1, 5):
      shutil.rmtree(alone / "checkpoints" / str(later))
    if step < 3:  # one more step from it must land on the next checkpoint exactly
      llmjax.train(config, alone)
      redone = load_model(alone / "checkpoints" / str(step + 1))[0].parameters
      for a, b in zip(jax.tree.leaves(redone), jax.tree.leaves(kept[step + 1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_runs_of_one_config_are_the_same_and_another_seed_is_not(finished, text, tmp_path):
  _, _, result = finished
  same = llmjax.train(tiny(text, data__cache=str(tmp_path / "cache")), tmp_path / "same")
  assert same["bits_per_byte"] == result["bits_per_byte"]
  import dataclasses

  other = dataclasses.replace(tiny(text), seed=1)
  assert llmjax.train(other, tmp_path / "other")["bits_per_byte"] != result["bits_per_byte"]


def test_accumulation_unrolling_remat_and_scan_do_not_change_the_run(finished, text, tmp_path):
  _, _, result = finished
  variants = {"model__scan": False, "model__remat": "dots", "train__grad_accum_steps": 4}
  made = llmjax.train(tiny(text, **variants), tmp_path / "variant")
  # fp32 rounding in another order, over 12 steps of Adam at a high rate.
  assert made["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=2e-3)


@pytest.mark.slow
def test_bf16_compute_learns_too(finished, text, tmp_path):
  _, _, result = finished
  made = llmjax.train(tiny(text, model__dtype="bfloat16"), tmp_path / "bf16")
  # bf16 keeps 8 bits: scores move by about 0.4 %, the loss over 12 steps by less than 2 %.
  assert made["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=2e-2)
