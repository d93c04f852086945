"""The benchmarks from the command line: mistakes, missing peers, llmjax alone at a tiny size."""

import json

import numpy as np
import pytest

from llmjax.bench import attention, sizes, workers
from llmjax.bench.ours import make_config
from llmjax.bench.sizes import SIZES, token_batches, write_weights
from llmjax.bench.suite import Options, bench, show
from llmjax.cli import main
from llmjax.models.build import count_parameters


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["trian"], "unknown bench 'trian'; did you mean 'train'?"),
    (["train", "--size=XXL"], "unknown size 'XXL'"),
    (["train", "--dtype=f32"], "unknown dtype 'f32'"),
    (["train", "--peers=llmjax,transformer"], "did you mean 'transformers'?"),
    (["decode", "--peers=litgpt"], "unknown peer 'litgpt' of bench decode"),
    (["train", "--rounds=0"], "rounds 0"),
    (["train", "--seconds=-1"], "seconds -1.0"),
    (["train", "--config.model.layer=3"], "did you mean 'model.layers'?"),
    (["attention", "--peers=llmjax"], "bench attention has no peers"),
    ([], "NAME"),
  ],
)
def test_mistakes_are_one_line(argv, message, capsys):
  assert main(["bench", *argv]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and message in captured.err.splitlines()[-1]


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
  peers = {"llmjax": workers.Peer("a:b"), "ghost": workers.Peer("c:d", ("no_such",))}
  monkeypatch.setitem(workers.PEERS, "train", peers)
  assert list(workers.pick("train")) == ["llmjax"]
  said = capsys.readouterr().err
  assert "ghost is left out, no_such is not installed; see requirements-bench.txt" in said
  assert main(["bench", "train", "--size=tiny", "--peers=ghost"]) == 2
  assert "none of the peers" in capsys.readouterr().err


def test_sizes_are_those_that_goals_are_stated_for():
  assert round(SIZES["L"].parameters / 1e6, 1) == 35.7
  assert round(SIZES["S"].parameters / 1e6, 1) == 4.5
  for name, size in SIZES.items():
    assert count_parameters(make_config(name, "float32").model) == size.parameters


def test_weights_and_tokens_are_the_same_every_time(tmp_path):
  size = SIZES["tiny"]
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    write_weights(size, tmp_path / name)
  files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
  assert files[0] == files[1]
  assert np.array_equal(token_batches(size), token_batches(size))
  assert token_batches(size).shape == (4, size.batch_size, size.length + 1)


def test_steps_fill_the_time_asked_for():
  made = sizes.timed_steps(iter([3.0, 2.0] + [1.0] * 10**6).__next__, 10, 0.01)
  assert made["losses"][:2] == [3.0, 2.0] and made["seconds"] >= 0.01
  assert made["tokens"] == 10 * len(made["losses"])
  assert made["tokens_per_s"] == made["tokens"] / made["seconds"]


@pytest.mark.slow
def test_train_and_decode_alone(capsys):
  argv = ["--size=tiny", "--peers=llmjax", "--rounds=2", "--seconds=0.01", "--json"]
  assert main(["bench", "train", *argv]) == 0
  out = capsys.readouterr().out
  result = json.loads(out.splitlines()[-1])
  (row,) = result["cases"][0]["rows"]
  assert row["peer"] == "llmjax" and row["ratio"] == 1 and row["tokens_per_s"] > 0
  # Logits have a standard deviation of 0.02 · √16 = 0.08, which adds its half square, 0.003.
  assert row["first_loss"] == pytest.approx(np.log(64), abs=0.05)
  assert result["first_step_cold_s"] > 0 and result["first_step_warm_s"] > 0
  assert "llmjax" in out and "tokens/s" in out


def test_attention_counts_the_compilers_temporaries(capsys):
  made = attention.measure(Options(rounds=1), positions=(128, 512))
  short, long = made["cases"][0]["rows"]
  # Scores are positions² · heads · 4 bytes, so at least those of one head must be there.
  assert long["temp_bytes"] > 512 * 512 * 4 and long["temp_bytes"] > 8 * short["temp_bytes"]
  assert short["seconds_per_step"] > 0
  assert "temporary MB" in show({**made, **bench_head()})


def bench_head():
  from llmjax.bench.report import machine

  return {"bench": "attention", "size": "L", "dtype": "float32", "machine": machine()}


def test_bench_is_a_function_first():
  with pytest.raises(ValueError, match="unknown bench"):
    bench("speed")
