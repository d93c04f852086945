"""Every mesh of 8 devices over data, fsdp and tensor gives the loss and gradients of one device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.tasks import language_model
from llmjax.models.build import abstract, build
from llmjax.models.config import ModelConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import batch_sharding, state_shardings
from llmjax.train.optim import OptimConfig, make_optimizer
from llmjax.train.state import init_sharded
from llmjax.train.step import compile_step, loss_and_grad, train_step

MESHES = [m for m in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(m) == 8]
CONFIG = ModelConfig(
  layers=2,
  width=32,
  heads=8,
  kv_heads=8,
  mlp_width=64,
  vocab_size=96,
  context=16,
  dtype="float32",
)
GROUPED = ModelConfig(**{**CONFIG.__dict__, "kv_heads": 4, "tie_embeddings": False})


def _batch(rows=16):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 96, (rows, 17))
  lengths = rng.integers(4, 14, rows)  # two packed documents and some padding in every row
  segments = np.stack(
    [np.where(np.arange(17) < n, 1, np.where(np.arange(17) < n + 3, 2, 0)) for n in lengths]
  )
  return language_model(tokens, segments)


def _one_device(config, accumulation):
  model = jax.jit(lambda: build(jax.random.key(0), config))()
  return jax.jit(loss_and_grad, static_argnums=2)(model, _batch(), accumulation)


@pytest.fixture(scope="module")
def truth():
  return {config: _one_device(config, 1) for config in (CONFIG, GROUPED)}


@pytest.mark.parametrize(
  ("sizes", "accumulation"), [(sizes, 2) for sizes in MESHES] + [((2, 2, 2), 1)], ids=str
)
def test_loss_and_every_gradient_equal_one_device(sizes, accumulation, truth):
  config = GROUPED if sizes[2] <= 4 else CONFIG
  mesh = make_mesh(MeshConfig(*sizes))
  shapes = abstract(config)
  shardings = state_shardings(mesh, shapes)
  model = jax.jit(lambda: build(jax.random.key(0), config), out_shardings=shardings)()
  step = jax.jit(
    lambda model, batch: loss_and_grad(model, batch, accumulation),
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=(None, shardings, None),
  )
  with jax.set_mesh(mesh):
    loss, grads, count = step(model, _batch())
  true_loss, true_grads, true_count = truth[config]
  assert count == true_count
  # fp32 sums over 96 scores and a few hundred tokens in another order: some 1e-6 of the value.
  np.testing.assert_allclose(loss, true_loss, rtol=2e-6)
  true_by_path = tree.flatten(true_grads)
  for path, grad in tree.flatten(grads).items():
    want = np.asarray(true_by_path[path])
    error = np.linalg.norm(grad - want) / np.linalg.norm(want)
    assert error < 1e-5, f"{path} is off by {error:.1e} of its norm"


def test_weights_are_really_cut():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  optimizer = make_optimizer(OptimConfig(), 10, abstract(CONFIG))
  state = init_sharded(CONFIG, 0, optimizer, mesh)
  leaves = tree.flatten((state.model, state.optimizer))
  assert sum(leaf.ndim >= 3 for leaf in leaves.values()) == 3 * 7
  for path, leaf in leaves.items():
    if leaf.ndim >= 3:  # stacked matrices: cut along fsdp and along tensor
      assert leaf.addressable_shards[0].data.size * 4 == leaf.size, path


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_three_steps_on_a_mesh_equal_three_on_one_device(kind):
  optimizer = make_optimizer(OptimConfig(kind=kind, warmup=1), 10, abstract(CONFIG))
  single = init_sharded(CONFIG, 0, optimizer, make_mesh(MeshConfig(1), jax.devices()[:1]))
  mesh = make_mesh(MeshConfig(2, 2, 2))
  sharded = init_sharded(CONFIG, 0, optimizer, mesh)
  step = compile_step(sharded, mesh, optimizer, accumulation=2, batch_size=16)
  plain = jax.jit(lambda state, batch: train_step(state, batch, optimizer=optimizer))
  for _ in range(3):
    single, want = plain(single, _batch())
    with jax.set_mesh(mesh):
      sharded, got = step(sharded, _batch())
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-5)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=2e-5)
  # Adam divides a gradient by its own size, so where a gradient is nearly zero its rounding is
  # blown up to a share of the learning rate (1e-3) a step; a wrong gradient moves by whole rates.
  # Muon does the like to small singular values: its five steps multiply them by up to 3.4 each.
  for path, leaf in tree.flatten(sharded.model).items():
    want = np.asarray(tree.flatten(single.model)[path])
    np.testing.assert_allclose(leaf, want, atol=3e-4, err_msg=path)


def test_init_is_the_same_on_every_mesh():
  optimizer = make_optimizer(OptimConfig(), 10, abstract(CONFIG))
  one = init_sharded(CONFIG, 7, optimizer, make_mesh(MeshConfig(1), jax.devices()[:1]))
  many = init_sharded(CONFIG, 7, optimizer, make_mesh(MeshConfig(2, 2, 2)))
  for path, leaf in tree.flatten(many).items():
    np.testing.assert_array_equal(leaf, tree.flatten(one)[path], err_msg=path)


def test_a_mesh_that_does_not_divide_names_array_and_sizes():
  config = ModelConfig(**{**CONFIG.__dict__, "kv_heads": 1})
  with pytest.raises(UserError, match=r"key_dkh' has 1 key/value heads \('k'\).*tensor 8"):
    state_shardings(make_mesh(MeshConfig(1, 1, 8)), abstract(config))
  with pytest.raises(UserError, match="does not divide the 8 devices"):
    make_mesh(MeshConfig(3, 1, 1))
  mesh = make_mesh(MeshConfig(8))
  optimizer = make_optimizer(OptimConfig(), 10, abstract(CONFIG))
  state = init_sharded(CONFIG, 0, optimizer, mesh)
  with pytest.raises(UserError, match=r"micro-batch' has 6 batch.*data 8 × fsdp 1"):
    compile_step(state, mesh, optimizer, accumulation=2, batch_size=12)


def test_a_batch_is_the_same_on_every_mesh():
  from llmjax.data.loader import local_rows, place

  batch = _batch(8)
  for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
    sharding = batch_sharding(make_mesh(MeshConfig(*sizes)))
    rows = local_rows(sharding, 8)
    assert rows == list(range(8))
    placed = place(batch, sharding, rows, 8)
    for got, want in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
      assert got.sharding == sharding
      np.testing.assert_array_equal(jnp.asarray(got), want)
