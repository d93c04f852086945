"""Proves that micro-batches add up to the batch, and that a step is the optimizer's on its mean."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.data.loader import DataConfig
from llmjax.data.tasks import language_model
from llmjax.models.build import abstract
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.training import step as steps
from llmjax.training.config import Config, TrainConfig
from llmjax.training.optim import OptimConfig
from llmjax.training.optimizers import started_from
from llmjax.training.parameters import TrainState, abstract_state, combine, init_sharded
from llmjax.training.step import compile_step, compiler_options, micro_batches
from tests.gradients import loss_and_grad
from tests.models.variants import VARIANTS, batch_of, inputs, scored_places, weights_of

ROWS = 4
# Sums over 40 predictions in another grouping, through two layers: some 2^5 roundings of 2^-24 of
# each array's largest value.
ROUNDING = 5e-6

micro = jax.jit(loss_and_grad, static_argnums=2)


@pytest.fixture(scope="module")
def batch():
  """Packed rows in which the number of predictions differs greatly from row to row."""
  rng = np.random.default_rng(0)
  segments = np.ones((ROWS, 13), int)
  segments[1, 6:] = 2
  segments[2, 3:] = 0
  segments[3, 12:] = 0
  made = language_model(rng.integers(0, 96, (ROWS, 13)), segments)
  mask = made.loss_mask_bt.copy()
  mask[0, :8] = 0  # as in fine-tuning: the prompt does not count
  return jax.tree.map(jnp.asarray, dataclasses.replace(made, loss_mask_bt=mask))


@pytest.fixture(scope="module")
def plain(tiny_decoder, batch):
  """jax.value_and_grad of the mean over the whole batch, written out."""

  @jax.jit
  @jax.value_and_grad
  def mean_loss(model):
    logits, _ = model(batch.tokens_bt, batch.segments_bt, batch.positions_bt)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets_bt[..., None], -1)
    return -jnp.sum(log_p[..., 0] * batch.loss_mask_bt) / jnp.sum(batch.loss_mask_bt)

  return mean_loss(tiny_decoder)


def assert_close(found, expected, rtol=ROUNDING):
  for path, leaf in tree.flatten(expected).items():
    atol = rtol * np.abs(leaf).max()
    assert_allclose(tree.flatten(found)[path], leaf, rtol=0, atol=atol, err_msg=path)


def test_the_rows_do_differ_in_predictions(batch):
  counts = np.asarray(batch.loss_mask_bt).sum(1)
  assert counts.min() * 4 < counts.max()
  pairs = np.asarray(micro_batches(batch, 2).loss_mask_bt).sum((1, 2))
  assert pairs[0] != pairs[1]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_plain_mean(tiny_decoder, batch, plain, accumulation):
  loss, grads, count, _ = micro(tiny_decoder, batch, accumulation)
  assert float(count) == float(batch.loss_mask_bt.sum())
  assert_allclose(loss, plain[0], rtol=1e-6)
  assert_close(grads, plain[1])


def test_a_batch_without_predictions_has_no_loss_and_no_gradient(tiny_decoder, batch):
  empty = dataclasses.replace(batch, loss_mask_bt=jnp.zeros_like(batch.loss_mask_bt))
  loss, grads, count, _ = micro(tiny_decoder, empty, 2)
  assert float(loss) == float(count) == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_every_micro_batch_draws_for_itself(tiny_decoder, batch):
  def objective(model, batch, key):
    drawn = jax.random.uniform(key)
    return drawn, jnp.float32(1), {"loss": drawn, "square": drawn**2}

  leaves = {"embed/token_vd": tree.flatten(tiny_decoder)["embed/token_vd"]}
  key = jax.random.key(0, impl="rbg")  # the default compiles slowly
  means, *_ = steps.loss_and_grad(tiny_decoder, leaves, batch, objective, ROWS, key)
  assert means["square"] - means["loss"] ** 2 > 1e-3  # the variance of four draws


def test_every_step_and_seed_draws_for_itself(tiny_config, tiny_decoder, batch, monkeypatch):
  class Called(Exception):
    pass

  keys = []

  def called(model, trainable, batch, objective, accumulation, key, *_):
    keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
    raise Called

  monkeypatch.setattr(steps, "loss_and_grad", called)
  config = experiment(dataclasses.replace(tiny_config, dropout=0.5), 1)
  for number, seed in ((0, 0), (1, 0), (1, 1), (1, 1)):
    state = TrainState(jnp.int32(number), tree.flatten(tiny_decoder), {}, None)
    with pytest.raises(Called):
      steps.advance(state, batch, dataclasses.replace(config, seed=seed))
  assert keys[2] == keys[3] and len(set(keys)) == 3


def test_micro_batches_hold_every_row_once():
  rows = np.arange(6)[:, None] + np.zeros((1, 3), int)
  parts = micro_batches(Batch(rows, rows, rows, rows, rows), 3)
  assert parts.tokens_bt.shape == (3, 2, 3)
  assert sorted(parts.tokens_bt[:, :, 0].ravel()) == list(range(6))
  assert_array_equal(parts.tokens_bt, parts.positions_bt)


def experiment(model, accumulation, optim=None) -> Config:
  """An experiment of ten steps of `ROWS` rows."""
  return Config(
    model=model,
    data=DataConfig(batch_size=ROWS),
    optim=optim or OptimConfig(),
    train=TrainConfig(steps=10, grad_accum_steps=accumulation),
  )


def test_a_compiled_step_is_the_optimizers_and_starts_from_the_seed(tiny_config, batch, plain):
  # With eps = 1 an update is smooth in its gradient, so clipping and rounding show as they are.
  config = OptimConfig(
    learning_rate=1.0, warmup=1, clip_norm=0.5, eps=1.0, weight_decay=0.1
  )
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  whole = experiment(tiny_config, accumulation=2, optim=config)
  like, step = abstract_state(whole, mesh), compile_step(whole, mesh)
  state = init_sharded(whole, mesh)  # seed 0 is tiny_decoder's key
  described, made = tree.flatten(like), tree.flatten(state)
  assert {path: (a.shape, a.dtype) for path, a in described.items()} == {
    path: (a.shape, a.dtype) for path, a in made.items()
  }
  before = jax.tree.map(jnp.copy, state.trainable)
  with jax.set_mesh(mesh):
    after, metrics = step(state, batch)

  assert int(after.step) == 1
  squares = [np.square(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(plain[1])]
  norm = np.sqrt(sum(square.sum() for square in squares))
  assert_allclose(metrics["loss"], plain[0], rtol=1e-6)
  assert_allclose(metrics["grad_norm"], norm, rtol=ROUNDING)
  assert float(metrics["tokens"]) == float(batch.loss_mask_bt.sum())
  assert norm > config.clip_norm  # before clipping, and clipping had something to do

  clipped = jax.tree.map(lambda grad: grad * (0.5 / norm), plain[1])
  for path, grad in tree.flatten(clipped).items():
    weight = before[path]
    decay = 0.0 if "scale" in path else 0.1 * weight
    # Adam's first update with its bias taken out is g / (|g| + eps).
    expected = weight - (grad / (np.abs(grad) + 1.0) + decay)
    atol = ROUNDING * float(np.abs(grad).max()) + 2**-23 * float(np.abs(weight).max())
    assert_allclose(after.trainable[path], expected, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize(("kind", "value"), [("adamw", "nan"), ("adamw", "huge"), ("muon", "nan")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(tiny_config, batch, kind, value):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  whole = experiment(tiny_config, accumulation=2, optim=OptimConfig(kind=kind, clip_norm=0.0))
  step, state = compile_step(whole, mesh), init_sharded(whole, mesh)
  mask = batch.loss_mask_bt.at[1, 2].set(jnp.nan)
  if value == "huge":  # a finite loss, though the squares of its gradient are not
    mask = batch.loss_mask_bt.at[1, 2:4].set(jnp.array([1e25, -1e25]))
  with jax.set_mesh(mesh):
    state, _ = step(state, batch)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, dataclasses.replace(batch, loss_mask_bt=mask))
    assert not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"]) == (value == "huge")
    assert int(state.step) == 1
    for path, leaf in tree.flatten(state).items():
      assert_array_equal(leaf, tree.flatten(before)[path], err_msg=path)
    state, metrics = step(state, batch)  # and it goes on as if nothing had been
    assert np.isfinite(metrics["grad_norm"]) and int(state.step) == 2
    # The second of 100 updates of warm-up to 1e-3; fp32 rounds the distance from the peak.
    assert_allclose(metrics["learning_rate"], 2 / 100 * 1e-3, rtol=50 * 2**-23)


def test_schedule_free_steps_take_gradients_at_y_and_hold_the_averages(tiny_config, batch):
  """By its paper's three sequences in NumPy, from the gradients that the steps return."""
  optim = OptimConfig(
    kind="schedule_free", schedule="constant", learning_rate=0.05, warmup=1, eps=1.0, clip_norm=0.0,
    weight_decay=0.0, beta1=0.6,
  )
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  whole = experiment(tiny_config, accumulation=2, optim=optim)
  step, state = compile_step(whole, mesh, with_grads=True), init_sharded(whole, mesh)
  # As if the weights had come from `init.checkpoint`: z starts from them too.
  other = {path: leaf * 1.5 for path, leaf in state.trainable.items()}
  kept = started_from(state.optimizer, other)
  state = dataclasses.replace(state, trainable=other, optimizer=kept)
  x = z = {path: np.asarray(leaf, np.float64) for path, leaf in other.items()}
  v = dict.fromkeys(x, 0.0)
  with jax.set_mesh(mesh):
    for number in (1, 2, 3):
      y = {path: 0.4 * z[path] + 0.6 * x[path] for path in x}
      point = combine(abstract(tiny_config), {p: jnp.asarray(w, jnp.float32) for p, w in y.items()})
      _, at_y, *_ = micro(point, batch, 2)
      state, _, grads = step(state, batch)
      assert_close(grads, at_y, rtol=4 * ROUNDING)  # y is rounded too, in other places
      for path, g in grads.items():
        v[path] = 0.95 * v[path] + 0.05 * np.square(np.asarray(g, np.float64))
        moved = np.asarray(g) / (np.sqrt(v[path] / (1 - 0.95**number)) + 1.0)
        z = z | {path: z[path] - 0.05 * moved}
        x = x | {path: (1 - 1 / number) * x[path] + z[path] / number}
        # x is worked out again from y: some roundings of it, over β₁.
        assert_allclose(state.trainable[path], x[path], rtol=0, atol=1e-6, err_msg=path)
  assert max(np.abs(x[path] - z[path]).max() for path in x) > 1e-3


@pytest.mark.parametrize("accumulation", [3, 8])
def test_a_batch_that_does_not_divide_is_a_user_error(tiny_config, accumulation):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with pytest.raises(UserError, match=rf"batch_size 4 .* train.grad_accum_steps {accumulation}"):
    compile_step(experiment(tiny_config, accumulation), mesh)


def test_images_without_tokens_train_too(quick_compile):
  config = VARIANTS["vit_mean"]
  given = inputs(config)
  targets, weights = scored_places(config, given)
  batch = batch_of(given, targets_bt=jnp.asarray(targets), loss_mask_bt=jnp.asarray(weights))
  loss, grads, count, routing = micro(weights_of(config), batch, 2)
  assert routing is None and np.isfinite(loss) and float(count) == float(weights.sum())
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_tpus_fast_memory_is_the_configs():
  def options(kind, platform="tpu", **more):
    device = SimpleNamespace(device_kind=kind, platform=platform)
    return compiler_options(
      SimpleNamespace(size=4, abstract_mesh=SimpleNamespace(abstract_device=device)), **more
    )

  key = "xla_tpu_scoped_vmem_limit_kib"
  assert options("TPU v5 lite") == {key: "20480"}
  assert options("TPU v5", vmem_mib=48)[key] == "49152"
  assert options("TPU v4") == {} and options("TPU v4", vmem_mib=8) == {key: "8192"}
  assert key not in options("cpu", "cpu", vmem_mib=48) and options("H100", "cuda") == {}
