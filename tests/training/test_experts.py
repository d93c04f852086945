"""Proves what training does for experts: losses that add up over micro-batches as documented,
biases that move towards even load and by nothing else, and figures of routing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.core.config import flat, override
from llmjax.core.errors import UserError
from llmjax.data.tasks import language_model
from llmjax.nn.router import RouterStats
from llmjax.training.config import Config
from llmjax.training.experts import move_biases, router_biases, routing_metrics
from llmjax.training.losses import LossConfig, routing_loss
from llmjax.training.objective import real_tokens
from llmjax.training.optim import OptimConfig, make_optimizer
from llmjax.training.step import micro_batches
from tests.gradients import first_step, loss_and_grad
from tests.models.variants import make_config, values_of, weights_of
from tests.reference import decoder as reference
from tests.reference import experts
from tests.reference.gradient import derivative
from tests.reference.losses import cross_entropy

ROWS, T = 4, 9
MODEL = make_config(**{
  "width": 16, "moe.experts": 4, "moe.width": 12, "moe.bias": True, "layers": 2,
})
pytestmark = pytest.mark.usefixtures("quick_compile")
# As in test_step.py: sums in another grouping, some 2^5 roundings of 2^-24 of the largest.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def batch():
  """Rows with padding of very different lengths, and predictions that do not count."""
  rng = np.random.default_rng(0)
  segments = np.ones((ROWS, T + 1), int)
  segments[1, 5:] = 2
  segments[2, 3:] = 0
  segments[3, 8:] = 0
  made = language_model(rng.integers(0, 40, (ROWS, T + 1)), segments)
  mask = made.loss_mask_bt.copy()
  mask[0, :5] = 0
  return jax.tree.map(jnp.asarray, dataclasses.replace(made, loss_mask_bt=mask))


@pytest.fixture(scope="module")
def model():
  return weights_of(MODEL)


BIAS = "decoder/blocks/moe/bias_e"
micro = jax.jit(loss_and_grad, static_argnums=(2, 3))


def routing_of(seed=0, layers=3, e=4) -> RouterStats:
  rng = np.random.default_rng(seed)
  shapes = {"load_e": (layers, e)}
  return RouterStats(**{
    field.name: jnp.asarray(rng.uniform(1, 5, shapes.get(field.name, (layers,))), jnp.float32)
    for field in dataclasses.fields(RouterStats)
  })


def test_the_loss_of_routers_is_the_weighted_sum_over_layers():
  routing = routing_of()
  loss = LossConfig(moe_aux=0.5, sequence_balance=0.25, router_z=0.125)
  expected = sum(
    0.5 * float(routing.balance[i]) + 0.25 * float(routing.sequence[i])
    + 0.125 * float(routing.z[i]) for i in range(3)
  )
  assert_allclose(routing_loss(loss, routing), expected, rtol=1e-6)
  assert float(routing_loss(LossConfig(moe_aux=0.0), routing)) == 0
  assert LossConfig().moe_aux > 0  # experts are balanced unless one says otherwise


def slow_objective(weights, batch, loss, parts):
  """Cross-entropy a prediction + routers' terms a token, of a batch in so many micro-batches."""
  cfg, total, counted, tokens = flat(MODEL), 0.0, 0.0, 0
  terms = dict.fromkeys(("balance", "sequence", "z"), 0.0)
  for first in range(parts):  # row i is of micro-batch i mod parts
    rows = slice(first, None, parts)
    given = {
      "tokens": np.asarray(batch.tokens_bt)[rows], "segments": np.asarray(batch.segments_bt)[rows],
      "positions": np.asarray(batch.positions_bt)[rows],
    }
    with watched() as seen:
      logits = reference.logits(weights, cfg, given)
    part = cross_entropy(
      logits, np.asarray(batch.targets_bt)[rows], np.asarray(batch.loss_mask_bt)[rows]
    )
    total, counted = total + part[0], counted + part[1]
    tokens += int((given["segments"] > 0).sum())
    for layer in seen:
      for key in terms:
        terms[key] += layer[key]
  aux = loss.moe_aux * terms["balance"] + loss.sequence_balance * terms["sequence"]
  return total / counted + (aux + loss.router_z * terms["z"]) / tokens


class watched:
  """Collects the terms of every layer that the reference runs."""

  def __enter__(self):
    self.seen, self.moe = [], experts.moe

    def moe(*args):
      y, terms = self.moe(*args)
      self.seen.append(terms)
      return y, terms

    reference.moe = moe
    return self.seen

  def __exit__(self, *_):
    reference.moe = self.moe


LOSSES = {
  "sequence_and_z": LossConfig(moe_aux=0.0, sequence_balance=0.5, router_z=0.3),
  "balance": LossConfig(moe_aux=0.5),
}


@pytest.mark.parametrize(("name", "accumulation"), [("sequence_and_z", 1), ("balance", 2)])
def test_gradients_are_those_of_the_reference(model, batch, name, accumulation):
  loss = LOSSES[name]
  nll, grads, count, routing = micro(model, batch, accumulation, loss)
  weights = values_of(model)
  bare = LossConfig(moe_aux=0.0)
  assert_allclose(nll, slow_objective(weights, batch, bare, 1), rtol=1e-5)
  assert float(count) == float(batch.loss_mask_bt.sum())
  assert routing.load_e.shape == (2, 4)
  rng = np.random.default_rng(0)
  for path in ("decoder/blocks/moe/router_de", "decoder/blocks/moe/up_edf", "embed/token_vd"):
    grad = np.asarray(tree.flatten(grads)[path], np.float64)
    direction = rng.normal(size=grad.shape) + 3 * grad / np.linalg.norm(grad) * grad.size**0.5
    direction /= np.linalg.norm(direction)
    theirs = derivative(
      lambda w, path=path: slow_objective({**weights, path: w}, batch, loss, accumulation),
      weights[path], direction,
    )
    size = np.linalg.norm(grad)
    assert_allclose(np.sum(grad * direction), theirs, rtol=0, atol=2e-5 * size, err_msg=path)


def test_sequence_balance_and_z_of_micro_batches_are_those_of_the_batch(model, batch):
  whole = micro(model, batch, 1, LOSSES["sequence_and_z"])
  parts = micro(model, batch, ROWS, LOSSES["sequence_and_z"])
  for path, grad in tree.flatten(whole[1]).items():
    atol = ROUNDING * np.abs(grad).max()
    assert_allclose(tree.flatten(parts[1])[path], grad, rtol=0, atol=atol, err_msg=path)
  for key in ("tokens", "load_e", "dropped", "entropy", "sequence", "z"):
    assert_allclose(getattr(parts[3], key), getattr(whole[3], key), rtol=1e-5, err_msg=key)


def test_balance_is_of_each_micro_batch(model, batch):
  """With as many micro-batches as rows it is that of rows, which differs from the batch's."""
  rows = micro(model, batch, ROWS, LOSSES["sequence_and_z"])[3]
  whole = micro(model, batch, 1, LOSSES["sequence_and_z"])[3]
  assert_allclose(rows.balance, whole.sequence, rtol=1e-5)
  assert (np.abs(rows.balance - whole.balance) > 1e-3 * whole.balance).all()


def test_real_tokens_are_those_outside_padding(batch):
  assert float(real_tokens(batch)) == int((np.asarray(batch.segments_bt) > 0).sum()) < ROWS * T
  assert float(real_tokens(dataclasses.replace(batch, segments_bt=None))) == ROWS * T
  parts = micro_batches(batch, 2)
  assert sum(float(real_tokens(jax.tree.map(lambda a, i=i: a[i], parts))) for i in range(2)) == (
    float(real_tokens(batch))
  )


@functools.partial(jax.jit, static_argnums=2)
def step(model, batch, config):
  """One step from fresh state: (parameters after it, metrics)."""
  after, metrics = first_step(model, batch, config)
  return after.trainable, metrics


def test_biases_move_by_the_rate_towards_even_load(model, batch):
  optim = OptimConfig(bias_rate=0.01, weight_decay=0.5, learning_rate=0.1, warmup=1)
  after, metrics = step(model, batch, Config(model=MODEL, optim=optim))
  load = np.asarray(micro(model, batch, 1, LOSSES["sequence_and_z"])[3].load_e)
  before, moved = tree.flatten(model)[BIAS], after[BIAS]
  assert len(np.unique(load)) > 3 and (load > load.mean(-1, keepdims=True)).any()
  for layer, expert in np.ndindex(load.shape):
    many, mean = load[layer, expert], np.mean(load[layer])
    expected = 0.01 if many < mean else -0.01 if many > mean else 0.0
    # Neither gradient nor decay: 0.5 · 0.1 of a bias of order 1 would be seen.
    found = moved[layer, expert] - before[layer, expert]
    assert_allclose(found, expected, rtol=0, atol=1e-6)
  assert_allclose(metrics["moe_load"], load / load.mean(-1, keepdims=True), rtol=1e-6)
  others = [path for path, a in tree.flatten(model).items()
            if np.array_equal(a, after[path])]
  assert not others  # all else is the optimizer's


def test_a_bias_has_no_gradient_and_stays_without_a_rate(model, batch):
  grads = micro(model, batch, 1, LOSSES["sequence_and_z"])[1]
  assert not np.any(grads[BIAS])
  before = tree.flatten(model)
  still = move_biases(before, [BIAS], jnp.ones((2, 4)).at[:, 0].set(9), 0.0)
  assert_array_equal(still[BIAS], before[BIAS])
  frozen = {path: leaf for path, leaf in before.items() if path != BIAS}
  assert move_biases(frozen, [BIAS], jnp.ones((2, 4)).at[:, 0].set(9), 0.1).keys() == frozen.keys()


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion", "schedule_free"])
def test_the_optimizer_leaves_a_bias_alone(model, kind):
  """Even where the sum of other gradients is clipped, and whatever the optimizer."""
  config = OptimConfig(kind=kind, schedule="constant", weight_decay=0.5)
  optimizer = make_optimizer(config, 10, model)
  before = tree.flatten(model)
  ones = {path: (0.0 if path == BIAS else 1.0) + 0 * leaf for path, leaf in before.items()}

  @jax.jit
  def updated(weights):
    updates, _ = optimizer.update(ones, optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)

  after, router = updated(before), "decoder/blocks/moe/router_de"
  assert_array_equal(after[BIAS], before[BIAS])
  assert np.any(after[router] != before[router])


def test_biases_bring_a_lopsided_router_to_even_load(model, batch):
  """The move's sign by its effect: after many moves alone, load is nearer to even."""

  @jax.jit
  def moved(model):
    routing = model.hidden(batch)[2]
    weights = move_biases(tree.flatten(model), [BIAS], routing.load_e, 0.05)
    return tree.unflatten(model, weights), routing.load_e

  still, first = moved(model)
  for _ in range(40):
    still, load = moved(still)
  worst = lambda load: float(jnp.max(load / load.mean(-1, keepdims=True)))  # noqa: E731
  assert worst(load) < 1.5 < 1.9 < worst(first)


def test_a_model_without_biases_is_left_as_it_is():
  plain = weights_of(make_config(**{"moe.experts": 4}))
  assert router_biases(plain) == [] and router_biases(weights_of(MODEL)) == [BIAS]
  weights = tree.flatten(plain)
  assert move_biases(weights, [], jnp.ones((2, 4)).at[:, 0].set(9), 0.1) == weights


def test_figures_of_routing_by_hand():
  routing = RouterStats(
    tokens=jnp.array([10.0, 10.0]),
    load_e=jnp.array([[20.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]]),
    dropped=jnp.array([5.0, 0.0]),
    entropy=jnp.array([2.0, 13.0]),
    balance=jnp.array([40.0, 10.0]),
    sequence=jnp.zeros(2),
    z=jnp.zeros(2),
  )
  found = routing_metrics(routing, [jnp.array([[1.0, 2.0]])])
  assert_allclose(found["moe_bias"], [[1, 2]])
  assert_allclose(found["moe_load"], [[4, 0, 0, 0], [1, 1, 1, 1]])
  assert_allclose(found["moe_entropy"], [0.2, 1.3], rtol=1e-6)
  assert_allclose(found["moe_max_load"], (4 + 1) / 2)
  assert int(found["moe_dead"]) == 3
  assert_allclose(found["moe_dropped"], [5 / 20, 0])
  assert_allclose(found["moe_balance"], (4 + 1) / 2)
  nothing = routing_metrics(jax.tree.map(jnp.zeros_like, routing), [])
  assert "moe_bias" not in nothing
  assert all(np.isfinite(value).all() for value in nothing.values())


@pytest.mark.parametrize("key", ["moe_aux", "sequence_balance", "router_z"])
def test_a_negative_weight_or_rate_is_a_user_error(key):
  with pytest.raises(UserError, match=rf"^loss\.{key} -1 is less than 0"):
    LossConfig(**{key: -1})
  with pytest.raises(UserError, match=r"^optim\.bias_rate -1 is less than 0"):
    OptimConfig(bias_rate=-1)


def test_a_router_that_the_loss_would_not_reach_is_a_user_error():
  with pytest.raises(UserError, match=r"^model\.moe\.renormalize makes the weight of a token's on"):
    override(Config(), ["--config.model.moe.experts=4", "--config.model.moe.top_k=1"])
