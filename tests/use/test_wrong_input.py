"""Paths that are empty or of the wrong kind, numbers out of range: one line each, status 2."""

import contextlib
import os

import pytest

from llmjax.cli import main
from llmjax.core.config import flat, override
from llmjax.core.errors import UserError
from llmjax.planning.candidates import change
from llmjax.training.config import Config

CONFIG = "from llmjax import Config, defaults\nget_config = lambda: defaults(Config)\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with a config, a file, an empty folder and a broken link, which commands run in."""
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "file").write_text("text")
  (tmp_path / "folder").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  monkeypatch.chdir(tmp_path)
  return tmp_path


def fails(capsys, line: str) -> str:
  """The one line of a command that must end with status 2."""
  assert main(line.split()) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("llmjax: error: ") and err.count("\n") == 1, err
  return err


TRAIN = "train --config=config.py --workdir="


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (TRAIN, "--workdir is empty"),
    ("train --config= --workdir=run", "--config is empty"),
    ("launch --config=config.py --workdir=run --on=", "--on is empty"),
    ("launch --config=config.py --workdir= --on=local:1", "--workdir is empty"),
    ("launch --config=config.py --workdir=file --on=local:1", "workdir 'file': it is a file"),
    ("eval --checkpoint=", "--checkpoint is empty"),
    ("generate --checkpoint= --prompt=x", "--checkpoint is empty"),
    ("generate --checkpoint=x --prompt=x --image=", "--image is empty"),
    ("convert --from=x --to=", "--to is empty"),
    ("convert --from= --to=x", "--from is empty"),
    ("plan --config=config.py --topology=", "--topology is empty"),
    ("plan --config=config.py --topology=h100:1 --patch=", "--patch is empty"),
    ("check --config=config.py --meshes=", "--meshes is empty"),
    ("train --config=folder --workdir=run", "config file 'folder' is a folder, not a file"),
    ("train --config=nowhere.py --workdir=run", "config file 'nowhere.py' does not exist"),
    ("train --config=link --workdir=run", "config file 'link' is a broken link, not a file"),
    ("convert --from=config.py --to=file", "target 'file': it is a file, not a folder"),
    ("eval --checkpoint=file", "/file' is a file, not a folder"),
    ("eval --checkpoint=link", "/link' is a broken link, not a folder"),
    ("eval --checkpoint=nowhere", "/nowhere' does not exist"),
    (TRAIN + "file", "workdir 'file': it is a file, not a folder"),
    (TRAIN + "link", "workdir 'link': it is a broken link, not a folder"),
    (TRAIN + "file/run", "workdir 'file/run' cannot be a folder: "),
    (TRAIN + "run --config.data.cache=file", "data.cache 'file': it is a file, not a folder"),
    (TRAIN + "run --config.data.cache=/dev/null/x", "'/dev/null' is a special file, not a folder"),
    (TRAIN + "run --config.init.checkpoint=nowhere", "init.checkpoint 'nowhere' does not exist"),
    (TRAIN + "run --config.train.executable=folder", "train.executable 'folder' is a folder, not"),
  ],
)
def test_a_path_that_cannot_be_meant_is_told_before_anything_is_read(here, capsys, line, message):
  before = sorted(here.rglob("*"))
  assert message in fails(capsys, line)
  assert sorted(here.rglob("*")) == before


def test_a_folder_without_permission_is_told(here, capsys, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("folder"))
  assert "workdir 'folder': it is not writable" in fails(capsys, TRAIN + "folder")
  assert "folder' is not writable" in fails(capsys, TRAIN + "folder/run")
  assert "data.cache 'folder': it is not writable" in fails(
    capsys, TRAIN + "run --config.data.cache=folder"
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("tokenizer.train_bytes=0", "tokenizer.train_bytes 0 is less than 1"),
    ("tokenizer.train_bytes=-5", "tokenizer.train_bytes -5 is less than 1"),
    ("tokenizer.vocab_size=0", "tokenizer.vocab_size 0 is less than 1"),
    ("tokenizer.vocab_size=-1", "tokenizer.vocab_size -1 is less than 1"),
    ("pipeline.chunks=0", "pipeline.chunks 0 is less than 1"),
    ("eval.stride=257", "eval.stride 257 is more than the 256 positions of a row"),
    ("eval.every=-1", "eval.every -1 is less than 0"),
    ("sample.temperature=-1.0", "sample.temperature -1.0 is less than 0"),
    ("sample.top_p=0.0", "sample.top_p 0.0 is not in (0, 1]"),
    ("sample.max_tokens=0", "sample.max_tokens 0 is less than 1"),
    ("sample.prompts=(3,)", "sample.prompts holds 3, which is not a string"),
    ("optim.groups=(1,)", "optim.groups holds 1, not (pattern, {option: value} or None)"),
    ("model.embed.start_token=-2", "model.embed.start_token -2 is less than -1"),
    ("model.vision.layers=-1", "model.vision.layers -1 is less than 0"),
    ("model.position.original_context=-1", "model.position.original_context -1 is less than 0"),
  ],
)
def test_a_number_out_of_range_is_refused_with_its_key(change, message):
  with pytest.raises(UserError) as found:
    override(Config(), [f"--config.{change}"])
  assert message in str(found.value)


def test_every_number_of_a_config_has_a_bound():
  """Far below zero no number of any section is taken; those that may be negative are named."""
  taken = set()
  for key, value in flat(Config()).items():
    if type(value) in (int, float) and not key.startswith("mesh."):  # those are checked together
      with contextlib.suppress(UserError):
        change(Config(), {key: type(value)(-1e6)})
        taken.add(key)
  scales = {"model.embed.scale", "model.embed.logit_scale"}
  unread = {f"model.position.{name}" for name in ("low_freq_factor", "high_freq_factor")}
  unread |= {f"model.position.{name}" for name in ("beta_fast", "beta_slow")}
  assert taken == scales | unread | {"model.vision.eps"}
