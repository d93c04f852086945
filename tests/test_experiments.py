"""Every experiment is a config that freezes, stays short, and says how to run it.

Those of published models are traced whole for the chips that they name: no array is made, and no
chip or compiler is needed.
"""

import ast
import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llmjax.core.chips import topology
from llmjax.core.config import flat, load
from llmjax.core.errors import UserError
from llmjax.formats.presets import preset
from llmjax.models.build import count_parameters
from llmjax.parallel.mesh import AXES, axis_sizes
from llmjax.planning.cost import memory
from llmjax.planning.estimate import estimate
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state
from llmjax.training.shrink import made_up_batch, shrink
from llmjax.training.step import compile_step

FILES = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))
# Experiment → model, and the weights that a token passes: of experts, those that it goes to.
PUBLISHED = {
  "llama2_7b": ("Llama-2-7B", 6.74e9),
  "llama3_8b": ("Llama-3-8B", 8.03e9),
  "llama3_70b": ("Llama-3-70B", 70.6e9),
  "llama3_405b": ("Llama-3-405B", 405.9e9),
  "mixtral_8x7b": ("Mixtral-8x7B", 12.9e9),
  "deepseek_v3": ("DeepSeek-V3", 37.6e9),
}
_HEAD = r"(\S+) chips of (\w+): (\w+) rows? of (\S+) tokens a chip\.$"

published = pytest.mark.parametrize("name", PUBLISHED)


@functools.cache
def _text(name: str) -> str:
  return ast.get_docstring(ast.parse(next(p for p in FILES if p.stem == name).read_text()))


@functools.cache
def _experiment(name: str):
  """Its config, the topology that its docstring names, and its mesh, without devices."""
  config = load(str(next(path for path in FILES if path.stem == name)), [], Config)
  chips = topology(re.search(r"--topology=(\S+)", _text(name))[1])
  sizes = axis_sizes(config.mesh, chips.devices)
  types = (AxisType.Auto,) * len(AXES)
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=types)
  return config, chips, mesh


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_freezes_and_tells_its_command(path):
  config = load(str(path), ["--config.model.vocab_size=4096"], Config)
  assert count_parameters(config.model) > 0
  text = path.read_text()
  assert text.count("\n") <= 120
  assert f"--config=experiments/{path.name}" in ast.get_docstring(ast.parse(text))


def test_there_are_experiments():
  assert FILES


@published
def test_a_published_model_is_whole_and_its_first_line_true(name):
  config, chips, _ = _experiment(name)
  model, length = preset(PUBLISHED[name][0]), config.model.max_seq_len
  theirs, ours = flat(model), flat(config.model)
  changed = {key for key in ours if ours[key] != theirs[key]}
  assert changed <= {"max_seq_len", "remat", "attention.block"}  # how it is run, not what it is
  assert count_parameters(config.model) == count_parameters(model)
  assert config.model.dtype == "bfloat16"  # a file of weights alone would be read as float32
  number, kind, rows, tokens = re.search(_HEAD, _text(name).splitlines()[0]).groups()
  rows = 1 if rows == "a" else int(rows)
  said = int(number.replace(",", "")), kind, rows, int(tokens.replace(",", ""))
  assert said == (chips.chips, chips.chip.name, config.data.batch_size / chips.chips, length)
  assert config.tokenizer.path and "`tokenizer.path`" in _text(name)


@published
def test_the_step_of_a_published_model_divides_over_its_chips(name):
  """Traces the step with all its constraints: whatever a mesh does not divide is an error."""
  config, chips, mesh = _experiment(name)
  state = abstract_state(config, mesh)
  held = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state))
  spread = 12 * count_parameters(config.model) / chips.devices  # weights and two moments, in fp32
  # Copies and what experts are not cut by cost room, but the half is left to all that is not state.
  assert spread <= held < chips.chip.hbm_bytes / chips.chip.devices / 2
  with jax.sharding.use_abstract_mesh(mesh):
    after, metrics = compile_step(config, mesh).eval_shape(state, _batch(config))
  shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
  assert shapes[0] == shapes[1]
  assert metrics["loss"].shape == ()


@published
def test_formulas_answer_for_a_published_model_and_find_compute_to_be_the_bound(name):
  config, chips, mesh = _experiment(name)
  found = estimate(config, chips, dict(mesh.shape))
  tokens = config.data.batch_size * config.model.max_seq_len
  flops = found.model_s * chips.chip.peak("bfloat16") * chips.chips
  # 6 for each weight and token, without the look-up, with attention: from 0.98 to 1.25 of it.
  assert 0.98 < flops / (6 * PUBLISHED[name][1] * tokens) < 1.25
  # Of DeepSeek-V3's latent attention the kernel pads values from 128 to the keys' 192 channels.
  assert found.least_s == found.roofline["compute_s"] and 0.68 < found.model_s / found.least_s <= 1


@published
def test_a_published_model_fits_its_chips_by_formula(name):
  config, chips, mesh = _experiment(name)
  needed = memory(config, dict(mesh.shape), chips.chip).peak
  assert needed < chips.chip.hbm_bytes / chips.chip.devices


def test_a_mesh_that_does_not_divide_a_published_model_is_refused():
  """Else the tracing above could not fail."""
  config, _, _ = _experiment("llama3_8b")
  sizes = tuple({"tensor": 3}.get(axis, 1) for axis in AXES)  # of 8 key heads
  mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  with pytest.raises(UserError, match="8 key/value heads"):
    abstract_state(config, mesh)


def _local_bytes(leaf) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _batch(config: Config):
  """Shapes of the batch, read off one of a single row."""
  one = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
  shape = lambda a: jax.ShapeDtypeStruct((config.data.batch_size, *a.shape[1:]), a.dtype)  # noqa: E731
  return jax.tree.map(shape, made_up_batch(one))


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
  monkeypatch.setattr(loader.sources, "read_sources", lambda *_: everything[:60])
  overrides = ["model.width=32", "model.heads=2", "model.mlp_width=64", "model.layers=1"]
  overrides += ["train.steps=6", "optim.warmup=2", "tokenizer.vocab_size=600"]
  overrides += ["model.max_seq_len=64"]
  overrides += ["sample.max_tokens=8", "eval.stride=32"]
  path = Path(__file__).parent.parent / "experiments" / "quickstart.py"
  config = load(str(path), [f"--config.{item}" for item in overrides], Config)
  result = llmjax.train(config, tmp_path / "run")
  assert 0 < result["xz_bits_per_byte"] < result["gzip_bits_per_byte"] < 8
  assert 0 < result["bits_per_byte"] < 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_check_can_shrink_every_experiment(path):
  config = shrink(load(str(path), [], Config), 8)
  assert config.model.max_seq_len == 64 and len(made_up_batch(config).tokens_bt) % 8 == 0
