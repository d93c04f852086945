"""The command line: results on standard output, one clear line and exit 2 for ordinary mistakes."""

import json
import shlex
from pathlib import Path

import pytest

from llmjax.cli import main
from tests.runs import tiny_values, write_text

CONFIG = """
from pathlib import Path
from tests.runs import tiny_values

def get_config():
  return tiny_values(Path({sources!r}), steps=4)
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """(config file, workdir of a finished run, its sources)."""
  folder = tmp_path_factory.mktemp("cli")
  sources = write_text(folder / "text")
  config = folder / "config.py"
  config.write_text(CONFIG.format(sources=str(sources)))
  workdir = folder / "it's a run"
  assert main(["train", f"--config={config}", f"--workdir={workdir}"]) == 0
  return config, workdir, sources


def fails(capsys, *argv) -> str:
  """Runs a command line that must end in one line on standard error and status 2."""
  capsys.readouterr()
  assert main([*argv]) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  errors = [line for line in captured.err.splitlines() if line.startswith("llmjax: error: ")]
  assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
  assert "Traceback" not in captured.err
  return errors[0]


def train(setup, tmp_path, *more):
  return ["train", f"--config={setup[0]}", f"--workdir={tmp_path / 'new'}", *more]


def test_json_is_the_last_line_of_standard_output(setup, capsys):
  config, workdir, sources = setup
  capsys.readouterr()
  assert main(["train", f"--config={config}", f"--workdir={workdir}", "--json"]) == 0
  lines = capsys.readouterr().out.splitlines()
  result = json.loads(lines[-1])
  assert result == json.loads((workdir / "result.json").read_text())
  # What the command proposes can be pasted into a shell, and is about this run and its text.
  generate, evaluate, other = (line.split(" -m llmjax ")[1] for line in lines[-4:-1])
  assert main([*shlex.split(generate), "--max_tokens=4"]) == 0
  assert capsys.readouterr().out.startswith(result["first_words"])
  texts = [" ".join(file.read_text().split()) for file in sources.iterdir()]
  assert len(result["first_words"]) > 1 and any(result["first_words"] in text for text in texts)
  assert main(shlex.split(evaluate)) == 0
  assert shlex.split(other)[2] == f"--workdir={workdir}-2"


def test_generate_continues_a_prompt_the_same_way_twice(setup, capsys):
  _, workdir, _ = setup
  argv = ["generate", f"--checkpoint={workdir}", "--prompt=ka lo", "--max_tokens=9", "--json"]
  texts = []
  for more in (["--seed=3"], ["--seed=3"], ["--temperature=0"], ["--top_k=1"], ["--top_p=0.001"]):
    capsys.readouterr()
    assert main([*argv, *more]) == 0
    lines = capsys.readouterr().out
    made = json.loads(lines.splitlines()[-1])
    assert lines.startswith("ka lo" + made["text"])
    assert len(made["logprobs"]) == len(made["ids"]) > 0 > max(made["logprobs"])
    texts.append(made["text"])
  assert texts[0] == texts[1]
  assert texts[2] == texts[3] == texts[4], "greedy, the one best and a tiny nucleus are the same"
  assert main([*argv, "--prompt=mi", "--seed=3"]) == 0  # a repeated prompt is a second one
  lines = capsys.readouterr().out.splitlines()
  both = json.loads(lines[-1])["completions"]
  assert [each["prompt"] for each in both] == ["ka lo", "mi"] and both[0]["text"] == texts[0]
  assert "--- 'ka lo'" in lines and "--- 'mi'" in lines


def test_eval_prints_its_scores(setup, capsys):
  _, workdir, sources = setup
  capsys.readouterr()
  argv = ["eval", f"--checkpoint={workdir}", f"--config.data.sources={sources}", "--json"]
  assert main(argv) == 0
  out = capsys.readouterr().out
  assert "bits_per_byte" in out
  assert json.loads(out.splitlines()[-1])["bytes"] == sum(
    p.stat().st_size for p in sources.iterdir()
  )


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.model.layer=3", r"unknown config key 'model.layer'; did you mean 'model.layers'\?"),
    ("--config.trian.steps=3", "unknown config key 'trian.steps'; did you mean 'train.steps'"),
    ("--config.train.steps=many", "config.train.steps=many: invalid literal for int"),
    ("--config.train.steps=1.5", "invalid literal for int"),
    ("--config.train.steps", "config key 'train.steps' has no value"),
    ("--config.train.steps=0", "train.steps 0 is less than 1"),
    ("--config.model.dtype=float8", "model.dtype 'float8' is unknown; did you mean 'float32'"),
    ("--config.model.heads=5", "model.heads 5 is not a multiple of model.kv_heads 2"),
    ("--config.optim.groups=(('*/bias_d',None),)", r"pattern '\*/bias_d' matches no parameter"),
    ("--config.optim.no_decay=('*',)", r"'optim.no_decay' is now called 'optim.groups'"),
    ("--config.mesh.tensor=3", "mesh data -1 × tensor 3 does not divide the 1 devices"),
    ("--config.mesh.data=2", "does not divide the 1 devices"),
    ("--config.data.batch_size=7 --config.train.grad_accum_steps=2", "7 is not a multiple of"),
    ("--config.data.sources=/no/such/folder", "source '/no/such/folder' does not exist"),
    ("--config.data.sources=", "data.sources is empty"),
    ("--config.data.sources={tmp}/empty", "source '.*/empty' holds no text"),
    (
      "--config.data.sources={tmp}/binary --config.data.not_text=refuse",
      r"'.*/binary/a.bin' is not text: byte 2 is not UTF-8",
    ),
    ("--config.data.sources={tmp}/nul", r"holds no text: .* 'a.txt' \(byte 1 is NUL\)"),
    ("--config.data.not_text=drop", "data.not_text 'drop' is unknown"),
    ("--config.data.sources={tmp}/a.jsonl", r"'.*/a.jsonl' line 1 has no field 'text'"),
    ("--config.data.held_out=0", "data.held_out 0.0 is not between 0 and 1"),
    ("--config.tokenizer.vocab_size=50000", "50000 is more than this text supports: at most"),
    ("--config.tokenizer.vocab_size=100", "100 is too small: 256 bytes"),
    ("--config.tokenizer.kind=bpe9", "unknown tokenizer kind 'bpe9'"),
    ("--config.tokenizer.path=/no/tokenizer.model", "/no/tokenizer.model': No such file"),
    ("--config.model.max_seq_len=1000000", "fewer than one row of 1000001"),
    ("--config.model.vocab_size=77", "model.vocab_size 77 is less than the 400 of tokenizer and"),
    (
      "--config.model.attention.context_parallel=gather",
      "context_parallel=gather changes nothing on a mesh of con",
    ),
    ("--config.mesh.across=stage", "mesh.across=stage changes nothing: all devices are in one"),
    ("--config.train.zero_stage=2", "train.zero_stage=2 changes nothing on a mesh of fsdp 1"),
    (
      "--config.train.grad_reduce_dtype=bfloat16",
      "grad_reduce_dtype=bfloat16 changes nothing on a mesh of fsdp 1",
    ),
    ("--config.pipeline.schedule=zb_h1", "pipeline.schedule=zb_h1 changes nothing on a mesh of s"),
    ("--config.seed=x", "invalid literal for int"),
    ("--config.seed=-1", "seed -1 is less than 0"),
    ("--config.eval.batch_size=0", "eval.batch_size 0 is less than 1"),
    ("--config.optim.learning_rate=nan", "optim.learning_rate nan is not a finite number"),
    ("--config.optim.beta1=2.0", r"optim.beta1 2.0 is not in \[0, 1\)"),
    ("--config.optim.kind=lion9", "optim.kind 'lion9' is unknown"),
    ("--config.optim.kind=sophia", "optim.kind 'sophia' is not offered: its estimate of the Hes"),
    ("--config.optim.warmup=4", "optim.warmup 4 is not below train.steps 4"),
    ("--config.optim.schedule=wsd:decay=3", "a decay of 3 steps does not fit into the 1 steps of"),
    (
      "--config.optim.groups=(('*/attention/*',{{'kind':'adam','decay':0.1}}),('*',{{}}))",
      "optim.groups: decay of 'decoder/blocks/attention/.*': kind 'adam' has none; use 'adamw'",
    ),
    ("--config.sample.max_tokens=0", "max_tokens 0 is less than 1"),
    ("--config.sample.prompts=('" + "ka~" * 99 + "',)", "prompt 0 has .* takes from 1 to 31"),
    ("--steps=4", "unknown argument '--steps=4'"),
  ],
)
def test_bad_input_to_train_is_one_line_and_leaves_nothing(
  override, message, setup, tmp_path, capsys
):
  import re

  (tmp_path / "empty").mkdir()
  (tmp_path / "binary").mkdir()
  (tmp_path / "binary/a.bin").write_bytes(b"ab\xff\xfe")
  (tmp_path / "a.jsonl").write_text('{"body": "ka lo"}\n')
  (tmp_path / "nul").mkdir()
  (tmp_path / "nul/a.txt").write_bytes(b"a\0b")
  overrides = override.format(tmp=tmp_path).split()
  line = fails(capsys, *train(setup, tmp_path, *overrides))
  assert re.search(message, line), line
  # The very same workdir then takes the corrected command.
  assert not (tmp_path / "new/result.json").exists()


def test_a_workdir_of_another_config_is_refused_and_kept(setup, capsys):
  config, workdir, _ = setup
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  argv = ["train", f"--config={config}", f"--workdir={workdir}"]
  line = fails(capsys, *argv, "--config.model.width=64", "--config.optim.warmup=9")
  assert f"{workdir} holds a run of another config: model.width (32 there, 64 here)" in line
  assert "optim.warmup (3.0 there, 9.0 here)" in line
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_a_workdir_survives_failed_commands_and_refuses_changed_text(setup, tmp_path, capsys):
  assert setup
  sources = write_text(tmp_path / "text")
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(sources=str(sources)))
  argv = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  fails(capsys, *argv, "--config.data.sources=/nowhere")
  fails(capsys, *argv, "--config.tokenizer.vocab_size=50000")
  fails(capsys, *argv, "--config.optim.groups=(('*/nothing',None),)")
  assert main(argv) == 0
  (sources / "00.txt").write_text("something else entirely\n" * 50)
  assert "the training text or tokenizer changed since this run began" in fails(capsys, *argv)


def test_config_files_with_mistakes(tmp_path, capsys):
  workdir = f"--workdir={tmp_path / 'new'}"

  def attempt(text):
    (tmp_path / "config.py").write_text(text)
    return fails(capsys, "train", f"--config={tmp_path / 'config.py'}", workdir)

  assert "does not exist" in fails(capsys, "train", "--config=/no/config.py", workdir)
  assert "no get_config() in it" in attempt("x = 1\n")
  assert "must return an ml_collections.ConfigDict" in attempt("def get_config():\n  return 3\n")
  assert "config.py:1: " in attempt("def get_config(:\n")
  head = "from llmjax.core.config import defaults\nfrom llmjax.training.config import Config\n"
  typo = head + "def get_config():\n  c = defaults(Config)\n  c.model.layrs = 3\n  return c\n"
  assert "config.py:5: " in attempt(typo) and "layrs" in attempt(typo)
  wrong = head + "def get_config():\n  c = defaults(Config)\n  c.train.steps = 'x'\n  return c\n"
  assert "config.py:5: " in attempt(wrong)
  extra = "from ml_collections import ConfigDict\n"
  extra += "def get_config():\n  return ConfigDict({'model': {'layerz': 3}})\n"
  assert "unknown config key 'model.layerz'; did you mean 'model.layers'?" in attempt(extra)


def test_bad_input_to_generate_and_eval(setup, tmp_path, capsys):
  _, workdir, _ = setup
  here = f"--checkpoint={workdir}"
  long = "--prompt=" + "ka lo mi " * 200
  assert "takes from 1 to 31" in fails(capsys, "generate", here, long)
  assert "--prompt is missing" in fails(capsys, "generate", here)
  for flag, message in {
    "--temperature=-1": "temperature -1.0 is less than 0",
    "--temperature=nan": "argument --temperature: nan is not a finite number",
    "--top_p=1e999": "argument --top_p: inf is not a finite number",
    "--top_p=0": "top_p 0.0 is not in (0, 1]",
    "--top_k=-2": "top_k -2 is less than 0",
    "--max_tokens=0": "max_tokens 0 is less than 1",
    "--seed=x": "invalid int value: 'x'",
    "--config.model.layers=3": "takes no --config.model.layers",
  }.items():
    assert message in fails(capsys, "generate", here, "--prompt=ka", flag)
  for verb in (["generate", "--prompt=ka"], ["eval"]):
    assert "does not exist" in fails(capsys, *verb, "--checkpoint=/no/where")
    assert "there is no checkpoint in" in fails(capsys, *verb, f"--checkpoint={tmp_path}")
  assert "source '/no/where'" in fails(capsys, "eval", here, "--config.data.sources=/no/where")
  line = fails(capsys, "eval", here, "--config.model.layers=3")
  assert "'model.layers' changes nothing here; eval reads data.sources" in line
  assert "unknown config key 'data.source'" in fails(capsys, "eval", here, "--config.data.source=x")


def test_verbs_and_arguments_with_mistakes(capsys):
  assert "unknown verb 'trian'; did you mean 'train'?" in fails(capsys, "trian")
  assert "VERB" in fails(capsys)
  assert "--workdir" in fails(capsys, "train", "--config=x.py")
  assert "--topology" in fails(capsys, "plan", "--config=x.py")
  there = ("--config=experiments/quickstart.py", "--topology=v5e:2x2")
  assert "invalid float value: 'x'" in fails(capsys, "plan", *there, "--price=x")


def test_the_tiny_config_is_editable():
  assert tiny_values(Path("x")).model.layers == 2
