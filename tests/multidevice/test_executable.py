"""A step compiled, kept and loaded by another process does what the first would have done."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.parallel.hlo_arrays import no_cache
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.run import train
from llmjax.training import executable
from llmjax.training.config import Config
from llmjax.training.metrics import read_metrics
from llmjax.training.parameters import abstract_state, init_sharded
from llmjax.training.runnable import with_vocab
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compile_step
from tests.runs import tiny, write_text

SMALL = (
  "model.layers=2", "model.width=32", "model.heads=4", "model.mlp_width=64", "model.vocab_size=64",
  "model.max_seq_len=16", "model.dtype=float32", "data.batch_size=8", "mesh.data=2", "mesh.fsdp=4",
)
IN_ANOTHER = (
  "import sys; from tests.multidevice.test_executable import configured, losses; "
  "print(losses(configured(*sys.argv[1:])))"
)


def configured(*changes) -> Config:
  return override(Config(), [f"--config.{change}" for change in (*SMALL, *changes)])


def losses(config: Config) -> list[float]:
  """Those of two steps on one made-up batch."""
  mesh, out = make_mesh(config.mesh), []
  batch = jax.device_put(made_up_batch(config), batch_sharding(mesh))
  step, state = executable.make_step(config, mesh), init_sharded(config, mesh)
  assert isinstance(step, jax.stages.Compiled) == bool(config.train.executable)
  with jax.set_mesh(mesh):
    for _ in range(2):
      state, metrics = step(state, batch)
      out.append(float(metrics["loss"]))
  return out


def keep(path, config: Config):
  """Writes the file of a config's step, as the compiler's process does."""
  mesh = make_mesh(config.mesh)
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)),
    made_up_batch(config),
  )
  with jax.set_mesh(mesh):
    lowered = compile_step(config, mesh).lower(abstract_state(config, mesh), batch)
  with no_cache():
    executable.save(path, lowered.compile(), config, mesh)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """The file of a compiled step."""
  path = tmp_path_factory.mktemp("kept") / "step"
  keep(path, configured())
  return path


def test_a_new_process_runs_the_kept_step_to_the_same_bits(kept):
  command = [sys.executable, "-c", IN_ANOTHER, f"train.executable={kept}"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-1] == str(losses(configured()))


@pytest.mark.slow
def test_a_run_trains_with_the_kept_step_as_without(tmp_path):
  config = tiny(write_text(tmp_path / "text"), steps=3, mesh__fsdp=4, mesh__data=2)
  keep(tmp_path / "step", with_vocab(config))
  train(config, tmp_path / "compiled")
  chosen = dataclasses.replace(config.train, executable=str(tmp_path / "step"))
  train(dataclasses.replace(config, train=chosen), tmp_path / "loaded")
  compiled, loaded = (
    [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
    for name in ("compiled", "loaded")
  )
  assert len(loaded) == 3 and loaded == compiled


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ("optim.learning_rate=0.5", "was made for optim.learning_rate 0.001, this run has 0.5"),
    ("mesh.data=4", "was made for mesh.data 2, this run has 4"),
    ("train.steps=7", "train.steps 1000, this run has 7"),
  ],
)
def test_another_run_is_told_in_what_it_differs(kept, change, says):
  changes = (f"train.executable={kept}", change, *(["mesh.fsdp=2"] if "mesh" in change else []))
  config = configured(*changes)
  with pytest.raises(UserError, match=says):
    executable.make_step(config, make_mesh(config.mesh))


def test_a_program_for_other_devices_or_another_jax_is_refused(kept, monkeypatch):
  config = configured(f"train.executable={kept}")
  swapped = make_mesh(config.mesh, [*jax.devices()[4:], *jax.devices()[:4]])
  with pytest.raises(UserError, match="device numbers"):
    executable.make_step(config, swapped)
  monkeypatch.setattr(executable.importlib.metadata, "version", lambda name: "0.1")
  with pytest.raises(UserError, match=r"was made for jax .*, this run has 0\.1"):
    executable.make_step(config, make_mesh(config.mesh))


@pytest.mark.parametrize("content", [None, b"", b"no json\nat all"])
def test_a_file_that_is_no_program_is_told(tmp_path, content):
  path = tmp_path / "step"
  if content is not None:
    path.write_bytes(content)
  config = configured(f"train.executable={path}")
  with pytest.raises(UserError, match="is not what llmjax plan keeps"):
    executable.make_step(config, make_mesh(config.mesh))
