"""The search: what it looks at, what it leaves out, and what it says, with a made-up compiler."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.core.chips import topology
from llmjax.core.config import flat, load, override
from llmjax.core.errors import UserError
from llmjax.parallel.mesh import AXES
from llmjax.planning.candidates import candidates, change, meshes, refined
from llmjax.planning.command import amount
from llmjax.planning.cost import memory
from llmjax.planning.estimate import estimate
from llmjax.planning.formulas import priced
from llmjax.planning.patch import patch
from llmjax.planning.plan import plan
from llmjax.planning.report import show, show_search
from llmjax.planning.search import search
from llmjax.training.config import Config

CHANGES = (
  "model.layers=4", "model.width=256", "model.heads=8", "model.kv_heads=4", "model.mlp_width=512",
  "model.vocab_size=512", "tokenizer.vocab_size=512",
  "model.max_seq_len=2048", "data.batch_size=24", "model.remat=full",
)


@pytest.fixture(autouse=True)
def few(monkeypatch):
  """Each candidate is estimated once for all tests, and few of the settings stand for all."""
  monkeypatch.setattr(sys.modules["llmjax.planning.candidates"], "estimate", _estimate)
  some = {"_REMAT": ("none", "full", "query+key+value"), "_SAVED": ("attention", "gate")}
  for name, values in (some | {"_CHUNKS": (128, 2048), "_BLOCKS": (64, 512)}).items():
    monkeypatch.setattr(sys.modules["llmjax.planning.candidates"], name, values)


_SEEN = {}


def _estimate(config, chips, sizes):
  key = (config, chips.name, chips.slices, *sizes.items())
  if key not in _SEEN:
    _SEEN[key] = estimate(config, chips, sizes)
  return _SEEN[key]


def config(*more):
  return override(Config(), [f"--config.{text}" for text in (*CHANGES, *more)])


def product_of(devices):
  return (s for s in itertools.product(range(1, devices + 1), repeat=6) if math.prod(s) == devices)


@pytest.mark.parametrize(("where", "devices"), [("v5e:2x4", 8), ("v5e:4x4", 16)])
@pytest.mark.parametrize("experts", [0, 4])
def test_meshes_are_all_that_divide_the_model(where, devices, experts):
  moe = ["model.moe.experts=4", "model.moe.top_k=2"] if experts else []
  expected = set()
  for sizes in product_of(devices):
    data, fsdp, stage, context, expert, tensor = sizes
    rows = 24 % (data * fsdp * expert) == 0
    # Width 256 takes any fsdp here; a tensor of 8 at most divides the 8 query heads, and shares the
    # 4 key heads.
    weights = 256 % fsdp == 0 and 8 % tensor == 0
    layers = stage in (1, 2, 4)  # of 4; in 3 a stage would idle, 8 and 16 have nothing for some
    positions = context <= 2  # 1,024 of the 2,048 are the least
    if rows and weights and layers and positions and (max(experts, 1)) % expert == 0:
      expected.add(sizes)
  found = list(meshes(config(*moe), topology(where)))
  assert {tuple(sizes[axis] for axis in AXES) for sizes in found} == expected
  assert len(found) == len(expected) > 10


def test_only_one_axis_crosses_slices():
  found = list(meshes(config(), topology("v5e:2x2", 2)))
  assert {sizes["across"] for sizes in found} == {"data", "stage"}
  assert all(sizes[sizes["across"]] % 2 == 0 for sizes in found)
  alone = {tuple(sizes[axis] for axis in AXES) for sizes in meshes(config(), topology("v5e:2x4"))}
  slow = {tuple(sizes[axis] for axis in AXES) for sizes in found}
  assert slow == {sizes for sizes in alone if sizes[0] % 2 == 0 or sizes[2] % 2 == 0}


def test_candidates_are_distinct_and_keep_the_batch():
  found = list(candidates(config(), topology("v5e:2x4")))
  assert len({str(sorted(one.changes.items())) for one in found}) == len(found)
  assert {one.config.data.batch_size for one in found} == {24}
  for one in found:
    rows = math.prod(one.sizes[axis] for axis in ("data", "fsdp", "expert"))
    assert 24 % (rows * one.config.train.grad_accum_steps) == 0
    assert one.config.train.zero_stage == 3 or one.sizes["fsdp"] > 1
  schedules = {one.config.pipeline.schedule for one in found if one.sizes["stage"] > 1}
  assert schedules == {"1f1b", "interleaved", "zb_h1"}


def test_estimates_are_not_below_the_roofline_and_know_what_costs():
  wide = config("model.width=2048", "model.mlp_width=8192")  # so that products cost most
  found = list(candidates(wide, topology("v5e:2x4")))
  for one in [*found, *candidates(wide, topology("v5e:2x2", 2))][::60]:
    least_s = one.estimate.least_s
    assert one.estimate.step_s >= least_s * (1 - 1e-12)  # sums in another order round otherwise

  def step_s(**wanted):
    wanted = {"model.remat": "none", "train.zero_stage": 3, "train.grad_accum_steps": 1} | wanted
    return min(
      x.step_s for x in found
      if all((x.changes | x.sizes).get(key) == value for key, value in wanted.items())
    )

  assert step_s(fsdp=8) < step_s(fsdp=8, **{"model.remat": "full"})
  piped = {"fsdp": 2, "stage": 4, "pipeline.schedule": "1f1b"}
  few, many = ({"train.grad_accum_steps": parts} for parts in (4, 12))
  assert step_s(**piped, **many) < step_s(**piped, **few)


def test_what_is_best_is_varied_further(monkeypatch):
  monkeypatch.undo()  # all settings
  found = {x.changes["model.remat"]: x for x in candidates(config(), topology("v5e:2x2"))}
  varied = lambda remat, key: {x.changes[key] for x in refined(found[remat])}  # noqa: E731
  assert varied("full", "model.attention.block") == {64, 128, 256, 512}  # other tiles each
  assert varied("full", "loss.chunk") == {128, 256, 512, 1024, 2048}
  assert varied("none", "model.remat") == {"none"}
  assert len(varied("full", "model.remat")) == 2**5
  assert "query+key+value+gate" in varied("full", "model.remat")
  assert len({str(x.config) for x in refined(found["full"])}) == 4 * 5 * 32
  few, many = (
    next(x.estimate for x in refined(found["full"]) if x.config.loss.chunk == chunk)
    for chunk in (2048, 128)
  )
  assert few.step_s < many.step_s


class Compiler:
  """Answers as `plan` does: twice the formula's seconds, `more` times its bytes."""

  def __init__(self, more=1.0, refused=()):
    self.asked, self.more, self.refused = [], more, refused

  def __call__(self, config, where, slices):
    place = topology(where, slices)
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    self.asked.append(sizes)
    if any(sizes[axis] == size for axis, size in self.refused):
      raise UserError("the compiler would not")
    peak = memory(config, sizes, place.chip).peak * self.more
    hbm = place.chip.hbm_bytes / place.chip.devices
    said = {"fits": peak <= hbm, "peak_bytes": peak, "hbm_bytes": hbm, "compile_s": 1.0}
    if not said["fits"]:
      return said
    step_s = 0.1 + 0.01 * sizes["data"] + 0.02 * sizes["tensor"]
    return said | {"est_step_s": step_s * (1 - config.train.vmem_mib / 1000), "mfu": 0.5}


def test_the_best_by_formula_is_never_pruned():
  place = topology("v5e:2x4")
  result = search(config(), [place], keep=0)
  every = list(candidates(config(), place))
  hbm = place.chip.hbm_bytes
  fits = lambda x: memory(x.config, x.sizes, place.chip).peak <= hbm  # noqa: E731
  fitting = [x for x in every if fits(x)]
  best = min(fitting, key=lambda x: x.step_s)
  rest = [x.step_s for x in refined(best) if fits(x)]
  assert result["winner"]["predicted_s"] == min([best.step_s, *rest])
  assert 0 < result["considered"] <= len(every) and result["fits"]


def test_the_compiler_has_the_last_word():
  compiler, lines = Compiler(), []
  result = search(config(), [topology("v5e:2x4")], keep=6, compile=compiler, report=lines.append)
  assert len(compiler.asked) == len(lines[2:]) == 6 + 1  # the best again, with more fast memory
  assert len({str(sizes) for sizes in compiler.asked}) >= 3  # as many meshes as half of them
  told = [row for row in result["rows"] if row["by"] == "compiler"]
  assert told == result["rows"][:7]  # none by formula alone stands before them
  assert [row["changes"].get("train.vmem_mib") for row in told[:2]] == [48, None]
  assert [row["step_s"] for row in told] == sorted(row["step_s"] for row in told)
  assert "predicted_s" in told[0] and told[0]["mfu"] == 0.5


def test_a_refused_candidate_is_a_row_with_its_reason():
  compiler = Compiler(refused=[("data", 1)])
  result = search(config(), [topology("v5e:2x4")], keep=6, compile=compiler)
  errors = [row for row in result["rows"] if "error" in row]
  assert errors and all(row["error"] == "the compiler would not" for row in errors)
  assert result["rows"][-len(errors) :] == errors
  assert result["winner"]["by"] == "compiler" and result["winner"]["mesh"]["data"] > 1
  assert "would not" in show_search(result, 1000)


def test_what_the_compiler_says_does_not_fit_is_followed_by_what_takes_less():
  place, base = topology("v5e:2x2"), config("data.batch_size=2048", "model.width=2048")
  compiler = Compiler(more=2.0)
  first = search(base, [place], keep=0)["winner"]["peak_bytes"]
  result = search(base, [place], keep=2, compile=compiler)
  assert first * 2.0 > place.chip.hbm_bytes  # else this tests nothing
  assert len(compiler.asked) == 2 + 2 + 1
  assert result["winner"]["by"] == "compiler" and result["winner"]["fits"]


def test_nothing_fits_is_an_answer():
  big = config("model.layers=64", "model.width=8192", "model.mlp_width=32768")
  compiler = Compiler()
  result = search(big, [topology("v5e:2x2")], compile=compiler)
  assert result["winner"] is None and not result["fits"] and not compiler.asked
  row = result["rows"][0]
  lacks = (row["peak_bytes"] - row["hbm_bytes"]) / 2**30
  assert result["says"].startswith("nothing fits: the closest")
  assert f"lacks {lacks:.1f} GiB" in result["says"]


def test_a_model_that_no_mesh_divides_is_an_error():
  with pytest.raises(UserError, match="no mesh of v5e:2x4 divides this model and 5 rows"):
    search(config("data.batch_size=5", "model.heads=3", "model.kv_heads=3", "model.head_dim=64",
                  "model.layers=3"), [topology("v5e:2x4")], keep=0)


def test_dollars_and_days_by_hand():
  tokens = 24 * 2048 * 86_400  # a step for each second
  row = search(config(), [topology("v5e:2x4")], tokens, keep=0)["winner"]
  # A step of s seconds then takes s days; eight v5e at $1.20 cost $230.40 a day.
  assert row["days"] == pytest.approx(row["step_s"])
  assert row["cost_usd"] == pytest.approx(230.4 * row["step_s"])
  assert row["usd_per_btokens"] == pytest.approx(row["cost_usd"] / tokens * 1e9)
  dearer = priced("v5e:2x4", usd_per_hour=2.40)
  twice = search(config(), [dearer], tokens, keep=0)["winner"]["cost_usd"]
  assert twice == pytest.approx(2 * row["cost_usd"])


def test_which_slice_to_rent():
  places = [topology("v5e:2x2"), topology("v5e:2x4"), topology("tpu7x:2x2x1")]
  result = search(config(), places, 20e9, keep=3, compile=Compiler())
  # The made-up compiler gives about the same seconds on either slice, so the small one is cheaper.
  assert result["winner"]["topology"] == "v5e:2x2"
  assert result["unpriced"] == ["tpu7x"] and "tpu7x has no list price" in result["says"]


def test_a_gpu_is_answered_by_formula_and_a_plan_says_the_same():
  result = search(config(), [topology("h100:8")], 24 * 2048, keep=2, compile=plan)
  best = result["winner"]
  assert best["by"] == "formula" and "GPU" in best["compiler"]
  changes = best["changes"] | {"train.steps": 1, "optim.warmup": 0.0}
  answer = plan(change(config(), changes), "h100:8")
  assert answer["predicted_s"] == best["step_s"] == best["predicted_s"] > answer["ideal_step_s"]
  assert answer["predicted_mfu"] == best["mfu"] and answer["peak_bytes"] == best["peak_bytes"]
  assert (answer["run_days"], answer["run_cost_usd"]) == (best["days"], best["cost_usd"])
  seconds = f"{best['step_s']:.4g} s"
  assert f"takes {seconds} by formula" in show(answer)
  assert f"{seconds} a step by formula" in result["says"]


@pytest.mark.parametrize(("text", "value"), [("20B", 20e9), ("1.5T", 1.5e12), ("2e10", 2e10)])
def test_amounts(text, value):
  assert amount(text) == value and amount("") == 0


@pytest.mark.parametrize("text", ["twenty", "20Q", "-5", "0", "$5", "1,000.5.2"])
def test_other_words_for_amounts_are_refused(text):
  with pytest.raises(UserError, match=r"is not an amount above 0, such as --tokens=20B"):
    amount(text)


FILE = '''"""A config."""

from llmjax.core.config import defaults
from llmjax.training.config import Config


def get_config():
  """Returns it."""
  config = defaults(Config)
  config.mesh.data = 1
  config.model.remat = "full"  # kept
  if config.model.layers:
    config.train.zero_stage = 1
  config.mesh.fsdp = 8
  return config'''


@pytest.mark.parametrize("tail", ["", "\n", "\n\nMORE = 1\n"])
def test_a_patch_applies_and_gives_the_winning_config(tmp_path, monkeypatch, tail):
  monkeypatch.chdir(tmp_path)
  path = Path("experiments/mine.py")
  path.parent.mkdir()
  path.write_text(FILE + tail)
  changes = {
    "mesh.data": 2, "mesh.fsdp": 4, "model.remat": "dots", "train.zero_stage": 3,
    "model.attention.block": 256, "mesh.across": "data",
  }
  wanted = change(load(str(path), [], Config), changes)
  (tmp_path / "my.patch").write_text(patch(str(path), wanted))
  subprocess.run(["git", "init", "-q"], check=True)
  subprocess.run(["git", "apply", "my.patch"], check=True)
  assert flat(load(str(path), [], Config)) == flat(wanted)
  assert "config.mesh.fsdp = 4\n" in path.read_text()  # changed where it stands
  assert "= 8" not in path.read_text() and path.read_text().endswith(tail or "config")
  assert patch(str(path), wanted) == ""


def test_a_config_that_is_already_the_best_is_said_to_be_and_no_patch_is_written(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(sys.modules["llmjax.planning.command"], "search", lambda *_, **__: {
    "rows": [], "says": "v5e:2x2", "winner": {"changes": {}},
  })
  path = tmp_path / "mine.py"
  path.write_text(FILE)
  argv = ("plan", f"--config={path}", "--topology=v5e:2x2", "--search", f"--patch={tmp_path / 'p'}")
  assert cli.main(argv) == 0
  assert "already holds the best settings" in capsys.readouterr().err
  assert not (tmp_path / "p").exists()


def test_a_mesh_axis_that_takes_what_is_left_is_no_change():
  changed = search(config("mesh.data=-1"), [topology("v5e:2x2")], keep=0)["rows"]
  assert changed and all("mesh.data" not in row["changes"] for row in changed)


def test_a_file_that_a_patch_cannot_change_is_told(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(FILE.replace("return config", "return config.lock()"))
  with pytest.raises(UserError, match="bare name"):
    patch(str(path), config())


def test_the_command_line(tmp_path, capsys):
  there = ("plan", "--config=experiments/quickstart.py", "--topology=v5e:2x2,v5e:2x4")
  files = (f"--patch={tmp_path / 'my.patch'}",)
  assert cli.main([*there, "--search", "--compile=0", "--tokens=1B", "--json", *files]) == 0
  *shown, last = capsys.readouterr().out.splitlines()
  found = json.loads(last)
  assert found["winner"] == found["rows"][0] and found["fits"] and found["says"] in shown
  assert "+  config.mesh." in (tmp_path / "my.patch").read_text()
  for wrong, told in (
    (["--tokens=1B"], "--tokens goes with --search"),
    (["--search", "--tokens=lots"], "--tokens=lots is not an amount above 0"),
    (["--search", "--decode"], "--decode does not go with --search"),
    (["--search", "--compile=-1"], "neither may be negative"),
  ):
    assert cli.main([*there, *wrong]) == 2
    assert told in capsys.readouterr().err
