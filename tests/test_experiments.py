"""Every experiment is a config that freezes, stays short, and says how to run it."""

import ast
from pathlib import Path

import pytest

from llmjax.core.config import load
from llmjax.models.build import count_parameters
from llmjax.train.config import Config

FILES = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_freezes_and_tells_its_command(path):
  config = load(str(path), ["--config.model.vocab_size=4096"], Config)
  assert count_parameters(config.model) > 0
  text = path.read_text()
  assert text.count("\n") <= 120
  assert f"--config=experiments/{path.name}" in ast.get_docstring(ast.parse(text))


def test_there_are_experiments():
  assert FILES


def test_the_quickstart_shrunk_runs_on_the_standard_library(tmp_path, monkeypatch):
  """The real corpus, cut to its first 60 files, through the real config, cut in width and steps."""
  import llmjax
  from llmjax.data import loader, sources

  everything = sources.read_sources("stdlib")
  assert len(everything) > 300 and sum(doc.size_bytes for doc in everything) > 5e6
  train, held_out = sources.split(everything, 0.05)
  held_bytes = sum(document.size_bytes for document in held_out)
  assert 0.01 < held_bytes / sum(doc.size_bytes for doc in everything) < 0.12
  assert not {doc.path for doc in train} & {doc.path for doc in held_out}
  monkeypatch.setattr(loader.sources, "read_sources", lambda spec: everything[:60])
  overrides = ["model.width=32", "model.heads=2", "model.mlp_width=64", "model.layers=1"]
  overrides += ["train.steps=6", "optim.warmup=2", "tokenizer.vocab_size=600", "model.context=64"]
  overrides += ["sample.max_tokens=8"]
  path = Path(__file__).parent.parent / "experiments" / "quickstart.py"
  config = load(str(path), [f"--config.{item}" for item in overrides], Config)
  result = llmjax.train(config, tmp_path / "run")
  assert 0 < result["xz_bits_per_byte"] < result["gzip_bits_per_byte"] < 8
  assert 0 < result["bits_per_byte"] < 8
