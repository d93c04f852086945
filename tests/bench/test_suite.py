"""The benchmarks from the command line: mistakes, missing peers, llmjax alone at a tiny size."""

import json

import numpy as np
import pytest

from llmjax.bench import sizes, suite
from llmjax.bench.ours import (
  attention_blockwise,
  attention_direct,
  make_config,
  write_weights,
)
from llmjax.bench.report import compare, machine
from llmjax.bench.sizes import SIZES, token_batches
from llmjax.bench.suite import bench, show
from llmjax.bench.workers import Spec
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
    (["attention", "--peers=llmjax"], "unknown peer 'llmjax' of bench attention"),
    ([], "NAME"),
  ],
)
def test_mistakes_are_one_line(argv, message, capsys):
  assert main(["bench", *argv]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and message in captured.err.splitlines()[-1]


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
  peers = {"llmjax": suite.Peer("a:b"), "ghost": suite.Peer("c:d", ("no_such",))}
  monkeypatch.setitem(suite.BENCHES, "train", suite.Bench("", peers))
  assert list(suite.pick("train")) == ["llmjax"]
  said = capsys.readouterr().err
  assert "ghost is left out, no_such is not installed; see requirements-bench.txt" in said
  assert main(["bench", "train", "--size=tiny", "--peers=ghost"]) == 2
  assert "none of the peers" in capsys.readouterr().err


def test_sizes_are_those_that_goals_are_stated_for():
  weights = {n: count_parameters(make_config(s, "float32").model) for n, s in SIZES.items()}
  assert (round(weights["L"] / 1e6, 1), round(weights["S"] / 1e6, 1)) == (35.7, 4.5)
  # Eight experts half as wide: four times the feed-forward weights, and routers.
  size = SIZES["S"]
  more = size.layers * (3 * 3 * size.width * size.mlp_width + 8 * size.width)
  assert weights["S-moe"] - weights["S"] == more


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_weights_and_tokens_are_the_same_every_time(tmp_path, name):
  size = SIZES[name]
  for copy in ("one", "two"):
    write_weights(size, tmp_path / copy)
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
  # Nothing is learnt yet: as a uniform guess, and half the variance of the logits, about 1, more.
  assert np.log(64) < row["first_loss"] < np.log(64) + 1
  assert result["first_step_cold_s"] > 0 and result["first_step_warm_s"] > 0
  assert "llmjax" in out and "tokens/s" in out


def test_attention_counts_the_compilers_temporaries():
  spec = Spec("", "tiny", "float32", "", 1)
  made = {
    name: [prepare(spec)[1]({"positions": n, "seconds": 0.01}) for n in (128, 512)]
    for name, prepare in (("direct", attention_direct), ("blockwise", attention_blockwise))
  }
  short, long = made["direct"]
  # Scores are positions² · heads · 4 bytes, so at least those of one head must be there.
  assert long["temp_bytes"] > 512 * 512 * 4 and long["temp_bytes"] > 8 * short["temp_bytes"]
  assert made["blockwise"][1]["temp_bytes"] < long["temp_bytes"] and long["tokens_per_s"] > 0
  rows = compare({name: rows[1:] for name, rows in made.items()}, "direct")
  head = {"bench": "attention", "size": "tiny", "dtype": "float32", "machine": machine()}
  shown = show({**head, "cases": [{"title": "512 positions", "rows": rows}], "notes": []})
  assert "temporary bytes" in shown and "blockwise" in shown and "512 positions" in shown


def test_bench_is_a_function_first():
  with pytest.raises(ValueError, match="unknown bench"):
    bench("speed")
