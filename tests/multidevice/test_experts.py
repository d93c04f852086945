"""Experts on meshes give the loss, every gradient and the steps of one device, however uneven."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.nn import moe, norm, position
from llmjax.parallel import expert
from llmjax.parallel.collectives import collectives
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import weight_shardings
from llmjax.training.check import _quick, all_meshes
from llmjax.training.parameters import abstract_state
from llmjax.training.pipelined import PipelineConfig
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compile_step
from tests.multidevice.test_step import BASE, EXPERTS, PIPELINES, experiment, named, prove

# Weights of an expert with few tokens have gradients of nearly nothing, whose rounding Adam would
# blow up to whole rates; a larger eps keeps an update smooth in its gradient.
SMALL = (*EXPERTS, "train.grad_accum_steps=2", "optim.eps=1e-4")
# As DeepSeek-V3's, with too little room for some.
ROUTED = (
  *SMALL, "model.moe.router=sigmoid", "model.moe.bias=True", "model.moe.first_k_dense=1",
  "model.moe.shared=1", "model.moe.width=64", "model.moe.capacity=1.0", "optim.bias_rate=0.01",
)
ALL_TO_ONE = (
  *SMALL, "model.layers=1", "train.grad_accum_steps=1", "model.moe.top_k=1", "model.moe.bias=True",
  "model.moe.renormalize=False",
)
MESHES = (
  {"expert": 8}, {"expert": 2, "tensor": 2, "context": 2}, {"stage": 2, "expert": 2, "fsdp": 2},
)


@pytest.mark.parametrize(
  "sizes",
  [*(pytest.param(one, marks=pytest.mark.slow) for one in MESHES[:2]), MESHES[2]],
  ids=named,
)
def test_loss_gradients_and_steps_equal_one_device(sizes):
  seen = prove(sizes, *ROUTED)
  biases = seen.weights["decoder/blocks/moe/bias_e"]
  assert biases.shape == (2, 8) and (np.abs(biases) > 0.005).mean() > 0.5  # they moved


def test_pipelines_are_proven_with_every_kind_of_position_norm_and_router():
  configs = [experiment(*changes).model for changes in (BASE, ROUTED)]  # of cubes with a stage
  configs += [experiment(*changes).model for _, changes, _ in PIPELINES]
  alike = dict.fromkeys(position.SINUSOIDS, "sinusoidal")  # orders of channels, without a weight
  kinds = {alike.get(kind, kind) for kind in position.KINDS}
  assert {config.position.kind for config in configs} == kinds
  assert {config.norm.kind for config in configs} == {*norm.KINDS}
  assert {config.norm.place for config in configs} == {*norm.PLACES}
  assert {config.moe.router for config in configs if config.moe.experts} == {*moe.ROUTERS}


@pytest.fixture
def lopsided(monkeypatch):
  """Routers that start with a bias by which all tokens want the last expert alone."""

  def constant(value):
    return lambda key, shape: jnp.full(shape, value).at[..., -1].set(9.0)

  monkeypatch.setattr(moe, "constant", constant)


@pytest.mark.parametrize(
  "sizes",
  [{"data": 2, "expert": 2, "tensor": 2}, pytest.param({"expert": 8}, marks=pytest.mark.slow)],
  ids=named,
)
def test_all_tokens_may_go_to_one_device(sizes, lopsided):
  seen = prove(sizes, *ALL_TO_ONE)
  grads = seen.grads["decoder/blocks/moe/up_edf"]
  assert not grads[:, :-1].any() and grads[:, -1].any()


def ragged_all_to_all(
  x_td, into_td, from_i, send_i, to_i, get_i, *, axis_name
):  # as jax's documentation has it; XLA has none on a CPU
  """Every device reads all slices of all devices and keeps those that are sent to it."""
  ways, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  x_std, *numbers = (jax.lax.all_gather(a, axis_name) for a in (x_td, from_i, send_i, to_i))
  from_si, send_si, to_si = (a.reshape(ways, ways, -1)[:, me] for a in numbers)
  row = jnp.arange(len(into_td))
  for sender in range(ways):
    for i in range(from_si.shape[1]):
      at = row - to_si[sender, i]
      here = (at >= 0) & (at < send_si[sender, i])
      sent_td = x_std[sender].at[from_si[sender, i] + at].get(mode="fill", fill_value=jnp.nan)
      into_td = jnp.where(here[:, None], sent_td, into_td)
  told = (send_si.reshape(-1) == get_i).all()  # what is to come was announced rightly
  return jnp.where(told, into_td, jnp.nan)


@pytest.fixture
def ragged(monkeypatch):
  """The way tokens take on TPU and GPU, into memory that holds anything."""
  monkeypatch.setattr(expert, "platform", lambda: "tpu")
  monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@pytest.mark.parametrize(
  "sizes", [pytest.param(MESHES[1], marks=pytest.mark.slow), {"expert": 4, "fsdp": 2}], ids=named
)
def test_the_ragged_exchange_gives_the_same(sizes, ragged):
  prove(sizes, *ROUTED)


@pytest.mark.slow
def test_the_ragged_exchange_takes_all_tokens_to_one_device(ragged, lopsided):
  prove({"expert": 8}, *ALL_TO_ONE)


@pytest.mark.slow
def test_nothing_but_stages_permutes_in_a_pipeline():
  """Devices of two stages that wait in permutes of different branches wait for ever."""
  config, batch = experiment(*ROUTED), made_up_batch(experiment(*ROUTED))
  mesh = make_mesh(MeshConfig(data=1, stage=2, context=2, tensor=2))
  with jax.set_mesh(mesh):
    lowered = compile_step(config, mesh).lower(abstract_state(config, mesh), batch)
    text = lowered.compile(compiler_options=_quick()).as_text()
  permuted = {one.axes for one in collectives(text, mesh) if one.kind == "collective-permute"}
  assert permuted == {("stage",)}


def test_a_mesh_that_does_not_divide_the_experts_names_array_and_sizes():
  model = abstract(experiment(*SMALL, "model.moe.experts=4").model)
  mesh = make_mesh(MeshConfig(data=1, expert=8))
  with pytest.raises(UserError, match=r"_efd' has 4 experts \('e'\), which mesh expert 8 does"):
    weight_shardings(mesh, model)


# No relu: a hidden number within rounding of its kink has one gradient on one mesh and another on
# the next, and Adam makes whole steps of it.
OTHERS = {
  "softmax": ("model.moe.top_k=3", "model.moe.renormalize=False", "train.grad_accum_steps=1"),
  "groups": ("model.moe.groups=4", "model.moe.top_groups=2", "model.remat=full"),
  "lightest": ("model.moe.capacity=0.7", "model.moe.drop=lightest"),
  "noisy": ("model.moe.noisy=True", "model.dropout=0.1"),
  "expert_choice": ("model.moe.router=expert_choice",),
  "hash": ("model.moe.router=hash", "model.moe.capacity=0.5", "model.activation=gelu"),
  "encoder": ("model.kind=encoder",),
  "muon": ("optim.kind=muon", "model.scan=False"),
  "windows": ("model.attention.pattern=('full','window')", "model.attention.window=9"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[1:], ids=named)
@pytest.mark.parametrize("name", OTHERS)
def test_every_router_on_meshes_of_three_axes(name, sizes):
  prove(sizes, *SMALL, *OTHERS[name])


CUT = [sizes for sizes in all_meshes(8) if "expert" in sizes and sizes not in MESHES]
UNCUT = [
  {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "stage": 2, "tensor": 2},
  {"stage": 2, "context": 2, "tensor": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CUT + UNCUT, ids=named)
def test_all_other_meshes_that_cut_experts_and_some_that_do_not(sizes):
  prove(sizes, *ROUTED, "model.heads=16", "model.kv_heads=8", "train.grad_accum_steps=8")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_zero_stages(zero):
  prove({"fsdp": 4, "expert": 2}, *ROUTED, zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [PipelineConfig("zb_h1"), PipelineConfig("interleaved", 2)])
def test_schedules_and_stages_of_unequal_layers(pipeline):
  prove({"stage": 2, "expert": 2, "tensor": 2}, *ROUTED, "model.layers=4", pipeline=pipeline)
