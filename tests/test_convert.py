"""`convert` moves a model between formats and changes none of its answers."""

import json
import os

import jax
import numpy as np
import pytest

import llmjax
from llmjax.cli import main
from llmjax.convert import FORMATS
from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.serve.sample import Sampling
from llmjax.text.base import Settings
from llmjax.text.sentencepiece import SentencePiece
from llmjax.training.stored import save_model
from tests.gguf_files import CONFIG, draw, llama_metadata, llama_tensors, write, write_folder

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model():
  """A random Llama with a tokenizer and a chat template."""
  text = "the quick brown fox jumps over the lazy dog\n"
  trained = SentencePiece.train([text * 20], 300)
  tokenizer = SentencePiece(trained.to_bytes(), Settings(chat_template=TEMPLATE, ends=[297, 299]))
  config = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48, vocab_size=300,
    max_seq_len=64, dtype="float32",
  )
  rng = np.random.default_rng(0)
  made = jax.tree.map(
    lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape) * 0.3, "float32"), abstract(config)
  )
  return Model(config, made, tokenizer)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("convert") / "checkpoint"
  save_model(model, folder)
  return folder


def same(one: Model, other: Model):
  ours, theirs = tree.flatten(one.parameters), tree.flatten(other.parameters)
  assert ours.keys() == theirs.keys()
  for path, array in ours.items():
    np.testing.assert_array_equal(array, theirs[path], err_msg=path)
  assert one.config == other.config
  assert one.tokenizer.encode("the fox\n dög") == other.tokenizer.encode("the fox\n dög")
  assert one.tokenizer.chat_template == other.tokenizer.chat_template
  assert (one.tokenizer.bos_id, one.tokenizer.eos_id) == (
    other.tokenizer.bos_id, other.tokenizer.eos_id
  )
  assert list(one.tokenizer.settings.ends) == list(other.tokenizer.settings.ends) == [297, 299]


def test_a_checkpoint_becomes_a_folder_and_a_checkpoint_again(model, checkpoint, tmp_path):
  same(llmjax.load(checkpoint), model)
  result = llmjax.convert(checkpoint, tmp_path / "hf")
  assert result["family"] == "llama" and result["path"] == str(tmp_path / "hf")
  assert result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model.parameters))
  files = [file for file in (tmp_path / "hf").rglob("*") if file.is_file()]
  assert result["bytes"] == sum(file.stat().st_size for file in files)
  names = {file.name for file in files}
  assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
  written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
  assert written["eos_token_id"] == [2, 297, 299]
  back = llmjax.convert(tmp_path / "hf", tmp_path / "back", format="checkpoint")
  assert back["family"] == "llmjax"
  same(llmjax.load(tmp_path / "back"), model)


@pytest.mark.parametrize("format", FORMATS)
def test_who_may_read_what_is_written_is_left_to_the_umask(checkpoint, tmp_path, format):
  before = os.umask(0o027)
  try:
    llmjax.convert(checkpoint, tmp_path / "made", format)
  finally:
    os.umask(before)
  modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "made").rglob("*")}
  assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}


def test_half_precision_rounds_once(model, checkpoint, tmp_path):
  result = llmjax.convert(checkpoint, tmp_path / "hf", dtype="bfloat16")
  assert result["bytes"] < llmjax.convert(checkpoint, tmp_path / "wide")["bytes"]
  found = tree.flatten(llmjax.load(tmp_path / "hf").parameters)
  for path, array in tree.flatten(model.parameters).items():
    want = np.asarray(array.astype("bfloat16"), np.float32)
    np.testing.assert_array_equal(found[path], want, err_msg=path)


def test_a_gguf_file_becomes_a_folder_of_the_same_logits(tmp_path, capsys):
  tensors = llama_tensors(draw(), CONFIG)
  write(tmp_path / "a.gguf", "llama", llama_metadata(CONFIG), tensors)
  argv = ["convert", f"--from={tmp_path / 'a.gguf'}", f"--to={tmp_path / 'hf'}", "--json"]
  assert main(argv) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert result["family"] == "llama"
  made = llmjax.load(tmp_path / "hf")
  write_folder(tmp_path / "want", draw())
  want = llmjax.load(tmp_path / "want")
  for path, array in tree.flatten(want.parameters).items():  # rotary rows are where they were
    np.testing.assert_array_equal(tree.flatten(made.parameters)[path], array, err_msg=path)
  assert made.config == want.config


def test_what_was_converted_generates_and_is_evaluated(checkpoint, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("the quick brown fox\n" * 9)
  scores = []
  for source in (checkpoint, tmp_path / "hf"):
    if source != checkpoint:
      llmjax.convert(checkpoint, source)
    argv = ["generate", f"--checkpoint={source}", "--prompt=the fox", "--temperature=0"]
    capsys.readouterr()
    assert main([*argv, "--max_tokens=5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = llmjax.generate(llmjax.load(source), ["the fox"], Sampling(0, max_tokens=5))[0]
    assert made["ids"] == want.ids
    before = sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*"))
    argv = ["eval", f"--checkpoint={source}", f"--config.data.sources={tmp_path / 'a.txt'}"]
    assert main([*argv, "--json"]) == 0
    scores.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*")) == before
  assert scores[0]["bytes"] == 20 * 9 and scores[0] == scores[1]
  assert main([*argv, f"--config.data.cache={tmp_path / 'cache'}"]) == 0
  assert list((tmp_path / "cache").iterdir())


def test_a_chat_is_rendered_and_ends_with_the_turn(model, checkpoint, capsys):
  argv = ["generate", f"--checkpoint={checkpoint}", "--prompt=the fox", "--temperature=0"]
  assert main([*argv, "--max_tokens=5", "--chat", "--json"]) == 0
  out = capsys.readouterr().out
  made = json.loads(out[out.rindex("{") :])
  eos = model.tokenizer.eos_id
  ids = [*model.tokenizer.encode("<user>the fox"), eos, *model.tokenizer.encode("<assistant>")]
  row = np.zeros((1, 64), np.int32)
  row[0, : len(ids)] = ids
  first = int(np.argmax(model.logits(row)[0, len(ids) - 1]))
  assert made["ids"][:1] == [first][: first != eos]
  assert out[: out.rindex("{")] == made["text"] + "\n"


def refused(capsys, *argv) -> str:
  capsys.readouterr()
  assert main(["convert", *map(str, argv)]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.count("\n") == 1
  return captured.err


def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys):
  here, there = f"--from={checkpoint}", f"--to={tmp_path / 'made'}"
  assert "does not exist" in refused(capsys, "--from=/no/where", there)
  assert "dtype 'float8' is unknown; did you mean 'float" in refused(
    capsys, here, there, "--dtype=float8"
  )
  assert "format 'gguf' is unknown" in refused(capsys, here, there, "--format=gguf")
  assert "leave out --dtype" in refused(
    capsys, here, there, "--format=checkpoint", "--dtype=float16"
  )
  assert "unknown" in refused(capsys, here, there, "--family=gpt9")
  assert "gpt2" in refused(capsys, here, there, "--family=gpt2")
  assert "takes no --config.model.layers" in refused(capsys, here, there, "--config.model.layers=1")
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "made").mkdir()
  (tmp_path / "made" / "mine").write_text("kept")
  assert "not empty" in refused(capsys, here, there)
  assert (tmp_path / "made" / "mine").read_text() == "kept"
  (tmp_path / "file").write_text("kept")
  assert "a file, not a folder" in refused(capsys, here, f"--to={tmp_path / 'file'}")


def test_an_empty_folder_is_filled_and_a_broken_attempt_leaves_nothing(
  checkpoint, tmp_path, monkeypatch
):
  (tmp_path / "made").mkdir()

  def fails(*args):
    (tmp_path / ".made.partial").mkdir()
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("llmjax.formats.hf.folder.save_folder", fails)
    with pytest.raises(UserError, match="cannot be written: No space left"):
      llmjax.convert(checkpoint, tmp_path / "made")
  assert [file.name for file in tmp_path.iterdir()] == ["made"]
  assert not any((tmp_path / "made").iterdir())
  llmjax.convert(checkpoint, tmp_path / "made")
  assert (tmp_path / "made" / "config.json").is_file()


def test_eval_and_load_say_what_a_path_is(checkpoint, tmp_path):
  llmjax.convert(checkpoint, tmp_path / "hf")
  with pytest.raises(UserError, match=r"data\.sources is empty; name a folder"):
    llmjax.evaluate(tmp_path / "hf")
  (tmp_path / "a.txt").write_text("text")
  with pytest.raises(UserError, match=r"a\.txt' is a file, but not a GGUF file"):
    llmjax.load(tmp_path / "a.txt")


def test_a_model_without_a_tokenizer_stays_without(model, tmp_path):
  bare = Model(model.config, model.parameters)
  save_model(bare, tmp_path / "bare")
  assert llmjax.load(tmp_path / "bare").tokenizer is None
  with pytest.raises(UserError, match="holds no tokenizer"):
    llmjax.evaluate(tmp_path / "bare", ["--config.data.sources=stdlib"])
