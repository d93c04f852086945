"""Every mesh gives the loss, every gradient and the optimizer steps of one device.

The rule: `make test` has every two axes together in a cube of three, with accumulation, packing,
windows, z-loss, clipping and remat on (`CUBES`, or `ELSEWHERE`); all 56 meshes of 8 devices are
marked slow. Longer rings, pipelines and exchanges are in `PIPELINES`, `test_context.py` and
`test_experts.py`. Every kind of position, norm and router goes through a pipeline once.
"""

import dataclasses
import functools
import itertools
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from llmjax.core import tree
from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.nn.embed import embedding_lookup
from llmjax.parallel.mesh import AXES, MeshConfig, make_mesh
from llmjax.parallel.rules import batch_sharding, weight_shardings
from llmjax.training.check import (
  GRADIENT_LIMIT,
  _quick,
  _start,
  all_meshes,
  compare,
  on_mesh,
  on_one_device,
)
from llmjax.training.config import Config
from llmjax.training.parameters import init_sharded
from llmjax.training.pipelined import PipelineConfig
from llmjax.training.shrink import made_up_batch, shrink
from llmjax.training.step import compile_step, compiler_options
from tests.gradients import loss_and_grad
from tests.models.variants import ROWS, batch_of, inputs, make_config, scored_places, weights_of

BASE = (
  "model.layers=2", "model.heads=16", "model.kv_heads=8", "model.tie_embeddings=False",
  "model.attention.pattern=('window',)", "model.attention.window=9", "model.remat=dots",
  "train.grad_accum_steps=4", "loss.z_loss=0.001", "optim.clip_norm=0.5", "optim.eps=1e-4",
  "loss.label_smoothing=0.1",
)


def experiment(*changes, devices=8) -> Config:
  """A small experiment with most of what can go wrong on a mesh; `changes` are `key=value`."""
  values = dict(change.split("=", 1) for change in (*BASE, *changes))  # given twice, tuples add up
  config = override(Config(), [f"--config.{key}={value}" for key, value in values.items()])
  small = shrink(config, devices)
  rows = (8 if devices == 8 else devices) * small.train.grad_accum_steps
  return dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=rows))


@functools.cache
def truth(changes=(), devices=8):
  """(config, batch, what one device makes of it), computed once."""
  config = experiment(*changes, devices=devices)
  batch = made_up_batch(config)
  return config, batch, on_one_device(config, batch)


def prove(sizes, *changes, devices=8, pipeline=None, zero=3, context="ring"):
  """Runs a mesh and compares it with one device; AdamW's weights too, after three steps."""
  config, batch, want = truth(changes, devices)
  config = dataclasses.replace(
    config,
    pipeline=pipeline or PipelineConfig(),
    train=dataclasses.replace(config.train, zero_stage=zero),
  )
  config = override(config, [f"--config.model.attention.context_parallel={context}"])
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])])
  seen = on_mesh(config, mesh, batch)
  row = compare(seen, want)
  assert row["ok"], {key: row[key] for key in ("loss_diff", "worst_leaf", "worst_rel")}
  # Adam divides a gradient by its own size plus eps, which here is above a gradient's rounding
  # (1e-6): a step moves by at most a hundredth of the learning rate (1e-3) more or less; a wrong
  # gradient moves a weight by whole rates.
  for path, leaf in seen.weights.items():
    np.testing.assert_allclose(leaf, want.weights[path], atol=3e-5, err_msg=path)
  return seen


def named(sizes) -> str:
  return "-".join(f"{axis}{size}" for axis, size in sizes.items())


CUBES = [{"data": 2, "fsdp": 2, "context": 2}, {"stage": 2, "context": 2, "expert": 2}]
ELSEWHERE = {  # cubes that a test of `make test` proves with other models or schedules
  "test_every_schedule_gives_the_same": ("stage", "fsdp", "tensor"),
  "test_a_pipeline_of_every_kind_of_layer_equals_one_device": ("data", "stage", "tensor"),
  "test_experts.py: test_loss_gradients_and_steps_equal_one_device": ("stage", "expert", "fsdp"),
  "test_experts.py: test_all_tokens_may_go_to_one_device": ("data", "expert", "tensor"),
  "test_objective.py, test_weight_kinds.py": ("fsdp", "tensor", "context"),
}


def test_every_two_axes_are_proven_together():
  pairs = {pair for axes in (*CUBES, *ELSEWHERE.values())
           for pair in itertools.combinations(sorted(axes), 2)}
  assert pairs == set(itertools.combinations(sorted(AXES), 2))


@functools.cache
def seen_on_cube(number):
  return prove(CUBES[number])


@pytest.mark.parametrize("number", range(len(CUBES)), ids=map(named, CUBES))
def test_loss_gradients_and_steps_equal_one_device(number):
  seen_on_cube(number)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [s for s in all_meshes(8) if s not in CUBES], ids=named)
def test_all_other_meshes_of_eight(sizes):
  prove(sizes, "model.layers=4", "model.attention.pattern=('full','window')")


SCHEDULES = (
  PipelineConfig("zb_h1"), PipelineConfig("interleaved", 2), PipelineConfig("gpipe"),
)


@pytest.mark.parametrize(
  "pipeline", [SCHEDULES[0], pytest.param(SCHEDULES[2], marks=pytest.mark.slow)],
  ids=lambda p: p.schedule,
)
def test_every_schedule_gives_the_same(pipeline):
  prove({"stage": 2, "fsdp": 2, "tensor": 2}, pipeline=pipeline)


ODD = ("model.width=60", "model.heads=30", "model.kv_heads=30", "model.mlp_width=60")
TABLE = (
  "model.position.kind=relative", "model.norm.place=sandwich", "model.layers=3",
  "model.tie_embeddings=True", "model.attention.pattern=('full','window')",
)
EXPERTS = (
  "model.layers=3", "model.heads=8", "model.attention.pattern=('full',)", "model.remat=none",
  "model.attention.window=0", "model.moe.experts=8", "loss.moe_aux=0.05",
  "loss.sequence_balance=0.03", "loss.router_z=0.01",
)
# (mesh, config, schedule). Stages in the middle read what is neither theirs nor at an end: the
# table of relative positions. Three layers are unequal on four stages, and on two of two chunks.
PIPELINES = (
  ({"stage": 4, "data": 2}, TABLE, PipelineConfig()),
  ({"stage": 2, "fsdp": 2, "tensor": 2}, TABLE, SCHEDULES[1]),
  (
    {"stage": 3},
    (*ODD, "train.grad_accum_steps=3", "model.position.kind=alibi", "model.norm.place=post",
     "model.norm.kind=layer", "model.norm.bias=True"),
    PipelineConfig(),
  ),
  (
    {"data": 2, "stage": 2, "tensor": 2},
    ("model.kind=encoder", "model.position.kind=learned", "model.norm.place=output",
     "model.embed.types=2", "model.embed.norm=True", "model.dropout=0.1", *EXPERTS,
     "model.moe.noisy=True"),
    PipelineConfig(),
  ),
  (
    {"stage": 4, "expert": 2},
    (*EXPERTS, "model.moe.router=expert_choice", "model.position.kind=sinusoidal"),
    PipelineConfig(),
  ),
  (
    {"stage": 4, "expert": 2},
    (*EXPERTS, "model.moe.router=hash", "model.moe.capacity=0.5", "model.position.kind=none",
     "model.activation=gelu"),
    PipelineConfig(),
  ),
)


@pytest.mark.parametrize(
  ("sizes", "changes", "pipeline"),
  [pytest.param(*row, marks=[pytest.mark.slow] * (n in (2, 4, 5))) for n, row in
   enumerate(PIPELINES)],
)
def test_a_pipeline_of_every_kind_of_layer_equals_one_device(sizes, changes, pipeline):
  prove(sizes, *changes, pipeline=pipeline, devices=math.prod(sizes.values()))


@pytest.mark.slow
def test_an_image_tower_before_a_pipeline_equals_one_device():
  changes = {"layers": 4, "position.kind": "relative", "attention.bias": "none"}
  config = make_config(**ROWS["llava"] | changes)
  model, row = weights_of(config), inputs(config)
  targets, weights = scored_places(config, row)
  batch = batch_of(row, targets_bt=targets, loss_mask_bt=weights)
  batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4), batch)
  run = lambda model, batch: loss_and_grad(model, batch, accumulation=4)[1]  # noqa: E731
  one = tree.flatten(jax.jit(run, compiler_options=_quick())(model, batch))
  mesh = make_mesh(MeshConfig(data=1, stage=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    options = _quick() | compiler_options(mesh)
    many = tree.flatten(jax.jit(run, compiler_options=options)(model, batch))
  for path, grad in one.items():
    if not path.startswith("vision/encoder/blocks/attention/key_bias"):  # 0 but for rounding
      assert np.linalg.norm(many[path] - grad) < GRADIENT_LIMIT * np.linalg.norm(grad), path


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "sizes"),
  [
    (6, {"fsdp": 3, "context": 2}), (6, {"data": 2, "tensor": 3}), (3, {"fsdp": 3}),
    (5, {"context": 5}), (5, {"tensor": 5}),
  ],
  ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_meshes_of_six_three_and_five(devices, sizes):
  prove(sizes, *ODD, f"train.grad_accum_steps={devices}", devices=devices)


def test_gradients_may_be_summed_in_bfloat16():
  config, batch, want = truth((
    "model.layers=1", "model.attention.pattern=('full',)", "model.attention.window=0",
    "model.remat=none", "train.grad_accum_steps=1",
  ))
  config = override(config, ["--config.train.grad_reduce_dtype=bfloat16"])
  seen = on_mesh(config, make_mesh(MeshConfig(data=1, fsdp=8)), batch)
  path = "decoder/blocks/mlp/up_df"
  # Each of eight parts is rounded to 8 bits, and so is the sum at every step.
  off = np.abs(seen.grads[path] - want.grads[path]) / np.abs(want.grads[path]).max()
  assert 2**-12 < off.max() < 16 * 2**-9


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zero_stages_differ_in_memory_alone(zero):
  number = CUBES.index({"data": 2, "fsdp": 2, "context": 2})
  seen = prove(CUBES[number], zero=zero)
  assert seen.peak_bytes > seen_on_cube(number).peak_bytes


@pytest.mark.parametrize(
  ("sizes", "zero"),
  [
    (CUBES[1], 3),  # compiled before: the compilation cache has it
    pytest.param({"data": 2, "fsdp": 4}, 1, marks=pytest.mark.slow),
  ],
  ids=["stage2-context2-expert2", "zero1"],
)
def test_a_step_that_is_not_finite_moves_no_weight_on_any_device(sizes, zero):
  config, batch, _ = truth()
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, zero_stage=zero))
  mask = np.array(batch.loss_mask_bt, np.float32)
  mask[-1, 2] = np.nan
  spoiled = dataclasses.replace(batch, loss_mask_bt=mask)
  seen = on_mesh(config, make_mesh(MeshConfig(**{"data": 1, **sizes})), spoiled)
  for path, leaf in _start(config).trainable.items():
    np.testing.assert_array_equal(seen.weights[path], leaf, err_msg=path)


@pytest.mark.slow
def test_dropout_draws_the_same_masks_on_any_mesh():
  prove({"fsdp": 2, "context": 4}, "model.dropout=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("context", ["gather", "all_to_all"])
def test_other_ways_to_cut_positions(context):
  prove({"context": 2, "tensor": 2, "fsdp": 2}, context=context)


KINDS = (
  ("model.kind=encoder",),
  ("model.kind=encoder_decoder", "model.position.kind=relative"),
  ("model.attention.mask=prefix",),
)


@pytest.mark.slow
@pytest.mark.parametrize("changes", KINDS, ids=lambda c: c[0].split("=")[1])
def test_other_kinds_of_model(changes):
  prove({"fsdp": 2, "context": 2, "tensor": 2}, *changes)


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_on_a_mesh_as_on_one_device():
  config, batch, exact = truth()
  low = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  one, many = on_one_device(low, batch), on_mesh(low, mesh, batch)
  off = {name: compare(seen, exact)["worst_rel"] for name, seen in (("one", one), ("many", many))}
  # bf16 rounds to 2^-9; which of two neighbours a sum rounds to changes with its order.
  assert off["many"] < 2 * off["one"] < 0.2


SEED = int(os.environ.get("LLMJAX_SEED") or time.time())


@pytest.mark.slow
@seed(SEED)
@settings(max_examples=12, deadline=None, database=None)
@given(st.data())
def test_random_meshes_and_configs(data):
  print(f"drawn with LLMJAX_SEED={SEED}")  # pytest shows it where the test fails
  draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
  sizes = data.draw(st.sampled_from(list(all_meshes(8))))
  changes = (
    f"model.dropout={draw(0.0, 0.1)}", f"model.remat={draw('none', 'full', 'dots')}",
    f"train.grad_accum_steps={draw(4, 8)}", f"model.tie_embeddings={draw(True, False)}",
    f"model.layers={draw(2, 3, 4)}", f"model.norm.place={draw('pre', 'post', 'sandwich')}",
    f"model.attention.sinks={draw(True, False)}", f"model.position.kind={draw('rope', 'alibi')}",
  )
  context = draw("ring", "gather", "all_to_all")
  pipeline = draw(PipelineConfig(), *SCHEDULES)
  if pipeline.schedule == "interleaved" and sizes.get("stage", 1) == 8:
    pipeline = PipelineConfig()  # takes a multiple of as many microbatches as stages
  prove(sizes, *changes, pipeline=pipeline, zero=draw(1, 2, 3), context=context)


@pytest.mark.slow
def test_muon():
  config, batch, want = truth(("optim.kind=muon",))
  seen = on_mesh(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), batch)
  assert compare(seen, want)["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_schedule_free(zero):
  """Gradients at points between two sets of weights, in ZeRO 1 of another layout than the other."""
  sizes = {"data": 2, "fsdp": 2, "stage" if zero == 3 else "tensor": 2}
  prove(sizes, "optim.kind=schedule_free", "optim.schedule=constant", zero=zero)


def test_weights_are_really_cut():
  state = init_sharded(experiment(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  leaves = tree.flatten((state.trainable, state.optimizer))
  assert sum(leaf.ndim >= 3 for leaf in leaves.values()) == 3 * 7
  for path, leaf in leaves.items():
    if leaf.ndim >= 3:  # stacked matrices: cut along fsdp and along tensor
      assert leaf.addressable_shards[0].data.size * 4 == leaf.size, path


def test_init_is_the_same_on_every_mesh():
  config = experiment("seed=7")
  one = init_sharded(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 4, "expert": 2}):
    many = init_sharded(config, make_mesh(MeshConfig(**{"data": 1, **sizes})))
    for path, leaf in tree.flatten(many).items():
      np.testing.assert_array_equal(leaf, tree.flatten(one)[path], err_msg=path)


def test_a_mesh_that_does_not_divide_names_array_and_sizes():
  config = experiment()
  few = dataclasses.replace(config.model, heads=6, kv_heads=6)
  with pytest.raises(UserError, match=r"key_dkh' has 6 key/value heads \('k'\).*tensor 8"):
    weight_shardings(make_mesh(MeshConfig(data=1, tensor=8)), abstract(few))
  mesh = make_mesh(MeshConfig(data=8))
  odd = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=12))
  odd = dataclasses.replace(odd, train=dataclasses.replace(config.train, grad_accum_steps=2))
  with pytest.raises(UserError, match=r"micro-batch' has 6 batch \('b'\), which mesh data 8 does"):
    compile_step(odd, mesh)
  odd = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=20))
  mesh = make_mesh(MeshConfig(data=1, context=8))
  with pytest.raises(UserError, match=r"row' has 20 query positions \('t'\).*context 8"):
    compile_step(odd, mesh)


def test_positions_of_targets_that_do_not_divide_are_named():
  with (
    jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))),
    pytest.raises(UserError, match=r"tokens.* 11 query positions \('t'\).*context 4"),
  ):
    embedding_lookup(jnp.zeros((16, 8)), jnp.zeros((2, 11), jnp.int32), "v", jnp.float32)


def test_a_batch_is_the_same_on_every_mesh():
  from llmjax.data.loader import local_rows, place

  batch = made_up_batch(experiment())
  count = len(batch.tokens_bt)
  for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "expert": 2}):
    sharding = batch_sharding(make_mesh(MeshConfig(**{"data": 1, **sizes})))
    rows = local_rows(sharding, count)
    assert rows == list(range(count))
    placed = place(batch, sharding, rows, count)
    for got, want in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
      assert got.sharding == sharding
      np.testing.assert_array_equal(np.asarray(got), want)
