"""What a config and a mesh alone decide is told first, alike by `train`, `plan` and `launch`."""

import itertools
import math
import random
import re

import jax
import pytest

from llmjax import run
from llmjax.cli import main
from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.parallel.mesh import AXES, MeshConfig, abstract_mesh
from llmjax.planning.plan import plan
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state
from llmjax.training.runnable import check_config, check_mesh, check_run
from llmjax.training.shrink import _few_heads, made_up_batch
from llmjax.training.step import advance

SMALL = (
  "model.layers=4", "model.width=32", "model.heads=8", "model.kv_heads=4", "model.mlp_width=64",
  "model.max_seq_len=32", "tokenizer.vocab_size=512", "data.batch_size=24",
)
# Changes of which a draw takes some; many do not go together, or not with every mesh.
CHANGES = (
  "data.batch_size=20", "train.grad_accum_steps=3", "train.grad_accum_steps=8",
  "model.max_seq_len=36", "model.max_seq_len=33", "model.kv_heads=1", "model.heads=4",
  "model.mlp_width=60",
  "model.width=40", "model.vocab_size=512", "model.vocab_size=500", "tokenizer.vocab_size=513",
  "tokenizer.kind=bytes tokenizer.vocab_size=0", "tokenizer.path=/no/where",
  "pipeline.schedule=zb_h1", "pipeline.schedule=interleaved pipeline.chunks=2",
  "pipeline.chunks=2", "train.zero_stage=1", "train.grad_reduce_dtype=bfloat16",
  "model.attention.context_parallel=all_to_all", "model.attention.context_parallel=gather",
  "mesh.across=stage",
  "mesh.slices=2", "mesh.slices=3", "optim.groups=(('*/bias_d',None),)",
  "optim.groups=(('*/up_df',None),('*',{}))",
  "model.kind=encoder", "model.kind=encoder_decoder", "model.moe.experts=4 model.moe.width=32",
  "model.position.kind=relative", "model.attention.kernel=splash", "model.attention.kernel=cudnn",
)
DEVICES = 8


class Began(Exception):
  """Text was about to be read."""


def drawn(seed: int) -> tuple[Config, int]:
  """A config with a mesh of eight devices, nearly always, and a number of slices."""
  rng = random.Random(seed)
  sizes = rng.choice([s for s in itertools.product((1, 2, 4, 8), repeat=6) if math.prod(s) == 8])
  if rng.random() < 0.1:
    sizes = (3, *sizes[1:])
  values = [f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)]
  while True:
    changes = " ".join(rng.sample(CHANGES, rng.randint(0, 4))).split()
    try:
      made = override(Config(), [f"--config.{text}" for text in (*SMALL, *values, *changes)])
      return made, rng.choice([1, 1, 2])
    except UserError:
      continue  # a config that contradicts itself is refused before any verb has it


def refusal(call) -> str:
  try:
    call()
  except UserError as error:
    return str(error)
  except Began:
    pass
  return ""


def trained(config: Config, devices: int, slices: int, workdir, monkeypatch) -> str:
  """How `train` refuses a config on so many GPUs, before it reads text."""
  def began(config):
    raise Began

  mesh = lambda config: abstract_mesh(config, devices, slices, "gpu")  # noqa: E731
  monkeypatch.setattr(run, "make_mesh", mesh)
  monkeypatch.setattr(run, "read_split", began)
  return refusal(lambda: run.train(config, workdir))


def test_plan_refuses_what_train_refuses_and_nothing_else(tmp_path, monkeypatch):
  said = []
  for seed in range(18):
    config, slices = drawn(seed)
    where = f"h100:{DEVICES // slices}"
    theirs = trained(config, DEVICES, slices, tmp_path, monkeypatch)
    ours = refusal(lambda c=config, w=where, s=slices: plan(c, w, s))
    assert ours == theirs, seed
    said.append(theirs)
  assert 3 < said.count("") < 15 and len(set(said)) > 6, "some of each are drawn"


@pytest.mark.slow
def test_what_is_let_through_traces_and_what_is_refused_does_not():
  """The oracle is the step itself, traced on the abstract mesh; without it checks could be few.

  Of CPUs, since cuDNN must be at hand to be traced.
  """
  seen = {True: 0, False: 0}
  for seed in range(200, 225):
    config, slices = drawn(seed)
    try:
      mesh = abstract_mesh(config.mesh, DEVICES, slices, "cpu")
      config = check_config(config)
    except UserError:
      continue
    refused = bool(refusal(lambda c=config, m=mesh: check_mesh(c, m)))
    seen[not refused] += 1
    assert refused == bool(refusal(lambda c=config, m=mesh: _trace(c, m))), seed
  assert min(seen.values()) > 3


def _trace(config, mesh):
  state, batch = abstract_state(config, mesh), jax.eval_shape(lambda: made_up_batch(config))
  with jax.sharding.use_abstract_mesh(mesh):
    jax.eval_shape(lambda state, batch: advance(state, batch, config)[1], state, batch)


PUBLISHED = (  # Llama-2-7B on h100:64
  "model.layers=32", "model.width=4096", "model.heads=32", "model.mlp_width=11008",
  "model.max_seq_len=2048", "tokenizer.vocab_size=32000", "mesh.data=8", "mesh.fsdp=8",
)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (("data.batch_size=4",), "'micro-batch' has 4 batch .* mesh data 8 × fsdp 8 does not div"),
    (("data.batch_size=256", "train.grad_accum_steps=3"), "256 is not a multiple of train.grad"),
    (
      ("data.batch_size=64", "model.max_seq_len=2049", "mesh.data=1", "mesh.context=8"),
      "'row' has 2049 query positions .* mesh context 8 does not divide",
    ),
    (("data.batch_size=64", "mesh.slices=4"), "mesh.slices 4, but the devices are in 2 slices"),
    (
      ("data.batch_size=64", "mesh.data=1", "mesh.context=8", "model.heads=4",
       "model.attention.context_parallel=all_to_all"), "4 query heads do not divide over tensor",
    ),
    (("data.batch_size=64", "model.attention.kernel=splash"), "kernel=splash .*TPU"),
    (
      ("data.batch_size=64", "mesh.data=1", "mesh.stage=8", "pipeline.schedule=interleaved"),
      "schedule 'interleaved' has two chunks a stage or more, not 1",
    ),
    (("data.batch_size=64", "model.vocab_size=31999"), "31999 is less than the 32000 of tok"),
    (("data.batch_size=64", "tokenizer.path=/no/x"), "/no/x': No such file"),
    (
      ("data.batch_size=64", "model.kind=encoder_decoder", "model.max_seq_len=512", "mesh.data=1",
       "mesh.fsdp=4", "mesh.context=16"),
      "'row of targets' has 152 .* which mesh context 16 does not divide",
    ),
    (
      ("data.batch_size=64", "model.kind=vision", "model.vision.image_size=32",
       "model.position.kind=learned", "model.vocab_size=10"), "train reads text",
    ),
  ],
)
def test_each_refusal_is_one_sentence_of_plan_and_train(
  changes, message, tmp_path, monkeypatch
):
  config = override(Config(), [f"--config.{text}" for text in (*PUBLISHED, *changes)])
  slices = 2 if "mesh.slices=4" in changes else 1
  ours = refusal(lambda: plan(config, f"h100:{64 // slices}", slices))
  assert re.search(message, ours), ours
  assert trained(config, 64, slices, tmp_path, monkeypatch) == ours


def test_a_gpu_kernel_is_planned_where_its_library_is_not_at_hand():
  changes = ("data.batch_size=64", "model.attention.kernel=cudnn", "model.dtype=bfloat16")
  config = override(Config(), [f"--config.{text}" for text in (*PUBLISHED, *changes)])
  check_run(config, abstract_mesh(config.mesh, 64, platform="gpu"))
  with pytest.raises(UserError, match=r"kernel=cudnn .*GPU"):
    check_run(config, abstract_mesh(config.mesh, 64, platform="tpu"))


def test_launch_refuses_before_it_starts_anything(tmp_path, capsys, monkeypatch):
  from launch import local

  monkeypatch.setattr(local, "launch", lambda *_: pytest.fail("it was started"))
  path = tmp_path / "config.py"
  path.write_text("from llmjax import Config, defaults\nget_config = lambda: defaults(Config)\n")
  argv = ["launch", f"--config={path}", f"--workdir={tmp_path / 'run'}", "--on=local:3"]
  assert main([*argv, "--devices=2"]) == 2
  assert "'micro-batch' has 16 batch ('b'), which mesh data 6 does not" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_mesh_of_devices_not_at_hand_is_that_of_devices_at_hand():
  from llmjax.parallel.mesh import make_mesh

  assert dict(abstract_mesh(MeshConfig(), 1).shape) == dict(make_mesh(MeshConfig()).shape)
  with pytest.raises(UserError, match="does not divide the 6 devices"):
    abstract_mesh(MeshConfig(tensor=4), 6)
  with pytest.raises(UserError, match="all devices are in one slice"):
    abstract_mesh(MeshConfig(across="stage"), 4)


def test_python_may_ask_about_a_mesh_alone():
  config = override(Config(), [f"--config.{text}" for text in (*SMALL, "model.vocab_size=512")])
  check_mesh(config, abstract_mesh(MeshConfig(data=2, tensor=4), 8))
  check_mesh(config, abstract_mesh(MeshConfig(tensor=8), 8))  # two devices share a key head
  with pytest.raises(UserError, match="key_dkh' has 4 key/value heads"):
    check_mesh(config, abstract_mesh(MeshConfig(tensor=6), 6))


def test_few_heads_are_divided_and_shared_by_the_same_meshes():
  def fits(k, g, tensor):
    return k * g % tensor == 0 and (k % tensor == 0 or (tensor > k and tensor % k == 0))

  for k, g, devices in itertools.product((1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 3, 4, 8), (2, 4, 6, 8)):
    few, group = _few_heads(k, g, devices)
    assert (few, group) <= (k, g) and (group > 1) == (g > 1), (k, g, devices)
    for tensor in range(1, devices + 1):
      if devices % tensor == 0:
        assert fits(few, group, tensor) == fits(k, g, tensor), (k, g, devices, tensor)
