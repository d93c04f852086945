"""What `llmjax plan` answers with and without the TPU's compiler, and what it is told to refuse."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from llmjax.cli import main
from llmjax.core import chips
from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.parallel.hlo_arrays import largest_buffers
from llmjax.parallel.mesh import AXES
from llmjax.planning import advice, compiler
from llmjax.planning.cost import memory
from llmjax.training.config import Config

CONFIG = """
from llmjax import Config, defaults

def get_config():
  config = defaults(Config)
  model = config.model
  model.layers, model.width, model.heads, model.mlp_width = 2, 256, 2, 512
  model.vocab_size, model.max_seq_len, model.remat, model.dtype = 1024, 512, "full", "bfloat16"
  config.tokenizer.vocab_size, config.data.batch_size = 1024, 8
  return config
"""
KEYS = {
  "fits", "peak_bytes", "hbm_bytes", "est_step_s", "ideal_step_s", "mfu", "compile_s",
  "collectives", "tokens_per_step", "cost_usd_per_btokens", "largest_buffers",
}


def needs_compiler(test):
  """Marks what asks the TPU's compiler, which `make test-oracle` installs."""
  absent = importlib.util.find_spec("libtpu") is None
  skipped = pytest.mark.skipif(absent, reason="the TPU's compiler is not installed")
  return pytest.mark.oracle(skipped(test))


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
  """Runs `llmjax plan` on a small config: (status, result as JSON, standard error)."""
  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
  config = tmp_path / "small.py"
  config.write_text(CONFIG)

  def run(*argv):
    capsys.readouterr()
    status = main(["plan", f"--config={config}", "--json", *argv])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if out else None, err

  return run


def test_gpus_are_planned_by_formula_alone(plan):
  status, said, _ = plan("--topology=h100:8", "--price=2")
  assert status == 0 and "GPU" in said["compiler"] and "est_step_s" not in said
  assert said["fits"] and 3 * 4 * said["parameters"] < said["peak_bytes"] < said["hbm_bytes"]
  assert said["tokens_per_step"] == 8 * 512
  step_s = said["predicted_s"]
  assert 0 < said["ideal_step_s"] < step_s
  usd = 8 * 2 / 3600 * step_s / (8 * 512) * 1e9
  assert said["cost_usd_per_btokens"] == pytest.approx(usd)
  assert said["tokens_per_day"] == pytest.approx(8 * 512 / step_s * 86_400)
  steps = Config().train.steps
  assert said["run_days"] == pytest.approx(steps * step_s / 86_400)
  assert said["run_cost_usd"] == pytest.approx(usd * steps * 8 * 512 / 1e9)
  held, sent = said["memory_by_formula"], said["sends_by_formula"]
  assert held["weights"] == held["gradients"] == 4 * said["parameters"]
  assert 0 < held["optimizer"] - 2 * held["weights"] <= 8  # two counts of steps
  # Whole copies of fp32 gradients are added up: 7/8 of them there, 7/8 back.
  (one,) = [one for one in sent if one["axis"] == "data"]
  assert one["kind"] == "all-reduce"
  assert one["bytes"] == pytest.approx(2 * 7 / 8 * 4 * said["parameters"], rel=0.01)
  # Of two layers all is done again but the product down, which no gradient reads; a tile of 512 is
  # the whole square of scores, of which the kernels take 2 products forward, twice, and 7 back.
  products = 2 * 2 * (4 * 256**2 + 2 * 256 * 512)
  square, seen = (2 * 4 * 256 * keys for keys in (512, 513 / 2))
  # A product with a permutation of a head's 128 channels turns queries and keys, forward, again and
  # back, and before the backward kernels attention's results are multiplied with their gradients.
  turned = 3 * 2 * 2 * 128 * 2 * 256 + 2 * 2 * 256
  again = products + (2 + 7 / 2) * square - 3 * seen + turned
  assert said["repeated_flops_per_step"] == pytest.approx(8 * 512 * again)


def test_without_the_compiler_formulas_answer_and_say_where_it_is(plan, monkeypatch):
  monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
  status, said, _ = plan("--topology=v5e:2x2", "--decode")
  assert status == 0 and ".venv/bin/pip install -e '.[plan]'" in said["compiler"]
  assert said["kwh_per_btokens"] is None  # Google publishes no watts of a chip
  # A row's keys and values: two layers of two heads of 128, in bfloat16.
  assert said["cache_bytes"] == 8 * 512 * 2 * 2 * 2 * 128 * 2
  assert said["prefill"]["tokens_per_step"] == 8 * 512 and said["tokens_per_step"] == 8


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--topology=mine:2x2"], "known: a100, b200, h100, h200, tpu7x, v4, v5e, v5p, v6e"),
    (["--topology=v5p:4x4"], "v5p comes as 2x2x1, 2x2x2"),
    (["--topology=v5e:2x2", "--config.mesh.fsdp=8"], "does not divide the 4 devices"),
    (
      ["--topology=h100:8", "--slices=3", "--config.mesh.data=4", "--config.mesh.fsdp=6"],
      "mesh.data 4 is not a multiple of the 3 slices",
    ),
    (["--topology=h100:8", "--price=-1"], "--price=-1.0 is not a number above 0"),
    (["--topology=h100:8", "--price=0"], "--price=0.0 is not a number above 0"),
    (["--topology=h100:8", "--price=nan"], "--price: nan is not a finite number"),
    (["--topology=h100:8", "--search", "--price=0"], "--price=0.0 is not a number above 0"),
    (["--topology=h100:8", "--search", "--tokens="], "--tokens is empty"),
    (["--topology=h100:8", "--keep-hlo="], "--keep-hlo is empty"),
    (["--topology=h100:8", "--decode", "--config.model.kind=encoder"], "wants model.kind=decoder"),
    (["--topology=h100:6", "--decode"], "'batch' has 8 batch"),

    (["--topology=h100:8", "--config.model.layer=1"], "unknown config key 'model.layer'"),
    (["--topology=h100:8", "--decode", "--keep-executable=x"], "--keep-executable"),
    (["--topology=h100:8", "--keep-hlo=x"], "nothing can be kept: there is none for GPUs"),
    (["--topology=h100:8", "--keep-hlo=no/x"], "'no/x': there is no such folder"),
    (["--topology=h100:8", "--slices=0"], "slices 0 is less than 1"),
  ],
)
def test_bad_input_is_one_line(plan, argv, says):
  status, said, err = plan(*argv)
  assert status == 2 and said is None
  assert says in err and err.count("\n") == 1


def small(*changes) -> Config:
  return override(Config(), [f"--config.{change}" for change in ("model.vocab_size=64", *changes)])


def test_an_answer_is_found_again_until_anything_that_decides_it_changes(tmp_path, monkeypatch):
  asked = []

  def compile_(task, folder):
    asked.append(task["program"])
    folder.mkdir(parents=True)
    answer = {"memory": {"peak": len(asked)}, "compile_s": 1.0, "largest_buffers": [{"bytes": 8}]}
    (folder / "answer.json").write_text(json.dumps(answer))
    (folder / "program.txt.gz").write_bytes(compiler.gzip.compress(b"HloModule"))

  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path))
  monkeypatch.setattr(compiler, "_run_compiler", compile_)
  version = {"libtpu": "1"}
  monkeypatch.setattr(compiler.importlib.metadata, "version", lambda name: version.get(name, "0"))
  where = chips.topology("v5e:2x2")

  def answers(*args, **options):
    answer, text = compiler.compile_ahead(*args, **options)
    assert text == "HloModule" and answer["largest_buffers"] == [{"bytes": 8}]
    return answer["memory"]["peak"], answer["cached"]

  assert answers(small(), where) == (1, False)
  assert answers(small(), where) == (1, True)
  assert answers(small("model.layers=3"), where) == (2, False)
  assert answers(small(), chips.topology("v5e:2x2", 2)) == (3, False)
  assert answers(small(), where, program="decode") == (4, False)
  version["libtpu"] = "2"
  assert answers(small(), where) == (5, False)
  assert answers(small(), where) == (5, True)


def test_largest_buffers_are_named_by_path_or_line():
  def double(tree):
    made = jnp.einsum("ij,kj->ik", tree["left"], tree["left"])
    return jnp.sort(made).sum()

  shapes = {"left": jax.ShapeDtypeStruct((64, 8), jnp.float32)}
  text = jax.jit(double).lower(shapes).compile().as_text()
  found = largest_buffers(text)
  argument = next(one for one in found if "left" in one.operation and one.shape == "f32[64,8]")
  assert argument.bytes == 64 * 8 * 4 and argument.operation.endswith("['left']")
  product = next(one for one in found if "dot_general" in one.operation)
  assert product.bytes == 64 * 64 * 4 and product.shape == "f32[64,64]"
  line = double.__code__.co_firstlineno + 1
  assert product.source == f"{__file__}:{line}"
  sizes = [one.bytes for one in found]
  assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 64 * 64 * 4 / 1000  # no scalar


def test_what_is_advised_fits_and_is_taken_by_the_config():
  config = small(
    "data.batch_size=64", "mesh.data=2", "mesh.fsdp=4", "train.zero_stage=1", "loss.chunk=0",
    "model.remat=none", "model.max_seq_len=1024", "model.vocab_size=65536",
  )
  place, sizes = chips.topology("h100:8"), dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 4}
  advised, more = advice.changes(config, place, 2.5, "train")
  assert more.startswith("about 20 chips instead of 8") and " by formula instead of " in advised
  keys = advised.partition(":")[0].split()
  changed = override(config, [f"--config.{key}" for key in keys])
  peak = lambda one: memory(one, sizes, place.chip).peak  # noqa: E731
  assert changed.mesh == config.mesh and peak(changed) <= peak(config) / 2.5
  (nothing, _) = advice.changes(config, place, 1e6, "train")
  assert "no settings of this one fit" in nothing


def test_what_is_advised_for_writing_text_is_taken_by_the_config():
  config = small("data.batch_size=64", "mesh.data=8")
  *advised, more = advice.changes(config, chips.topology("h100:8"), 2.5, "decode")
  assert more.startswith("about 20 chips instead of 8") and len(advised) == 3
  for one in advised:
    keys = one.partition(":")[0].split()
    assert override(config, [f"--config.{key}" for key in keys]) != config
  crossed = advice.changes(config, chips.topology("h100:4", 2), 2.5, "decode")
  assert any("mesh.data=2 " in one for one in crossed), "two slices need two along data"


# As libtpu 0.0.42 wrote it for eight layers 4,096 wide, four rows of 2,048 a device, on v5e:2x2.
TOO_MANY_TEMPORARIES = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
  "(22.88G) exceeds available HBM (15.75G)."
)


def test_what_does_not_fit_says_what_it_wants():
  # Rows of 2,048: 12.09 GiB with one a device, 15.70 with two, 22.88 with four, by this and by the
  # peaks of those that fit: so arguments are counted in it.
  found = compiler.read_full(TOO_MANY_TEMPORARIES)
  assert found["peak_bytes"] == pytest.approx(22.88 * 2**30)
  assert found["usable_bytes"] == 15.75 * 2**30
  # In the form of libtpu until 2025, as in github.com/erfanzar/EasyDeL/issues/166.
  older = "Ran out of memory in memory space hbm. Used 20.50G of 15.48G hbm. Exceeded by 5.02G."
  assert compiler.read_full(older)["peak_bytes"] == 20.5 * 2**30


def test_a_refusal_that_is_not_about_memory_is_an_error():
  with pytest.raises(UserError, match="refused the program: INTERNAL: Mosaic"):
    compiler.read_full("INTERNAL: Mosaic failed\nand more")


ON_FOUR = (
  "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4",
  "--config.data.batch_size=128",  # of less, all that the program makes is in fast memory
)


@needs_compiler
def test_the_compiler_is_asked_once(plan, tmp_path):
  kept, program = tmp_path / "hlo", tmp_path / "program"
  status, said, _ = plan(*ON_FOUR, f"--keep-hlo={kept}", f"--keep-executable={program}")
  assert status == 0 and said["fits"] and not said["cached"] and said.keys() >= KEYS
  assert kept.read_text().startswith("HloModule") and program.stat().st_size > 1_000_000
  # On four devices weights, two moments and a token's four integers; and padding of small ones.
  held = 3 * said["parameters"] + 4 * said["tokens_per_step"]
  assert 0 < said["memory"]["arguments"] / held - 1 < 0.1
  assert {one["axis"] for one in said["collectives"]} == {"fsdp"}
  assert 0 < said["mfu"] < 1 and said["est_step_s"] > said["roofline"]["compute_s"]
  assert any("llmjax/" in one["source"] for one in said["largest_buffers"])
  _, again, _ = plan(*ON_FOUR)
  assert again == said | {"cached": True}


@needs_compiler
def test_two_slices_run_one_program_each(plan):
  status, said, _ = plan(*ON_FOUR[:1], "--slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4")
  assert status == 0 and said["fits"] and said["chips"] == 8
  assert {"fsdp", "data"} <= {one["axis"] for one in said["collectives"]}
  assert said["estimate"]["dcn_s"] > 0


@needs_compiler
def test_writing_is_planned_by_its_two_programs(plan):
  status, said, _ = plan(*ON_FOUR[:1], "--decode", "--config.mesh.data=2", "--config.mesh.tensor=2")
  assert status == 0 and said["fits"] and said["prefill"]["fits"] and said.keys() >= KEYS
  assert said["tokens_per_s"] == pytest.approx(8 / said["est_step_s"])
  # A fourth of the cache, half of the weights in bfloat16: rows and heads are cut in two.
  held = said["cache_bytes"] / 4 + said["parameters"]
  assert 0 < said["memory"]["arguments"] / held - 1 < 0.1


@needs_compiler
@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--topology=v5e:2x2", "--config.data.batch_size=6"], "does not divide"),
    (["--topology=v5e:2x2", "--config.model.kind=encoder", "--decode"], "model.kind=decoder"),
  ],
)
def test_what_the_compiler_refuses_is_one_line(plan, argv, says):
  status, said, err = plan(*argv)
  assert status == 2 and said is None
  assert says in err.splitlines()[-1] and "Traceback" not in err
