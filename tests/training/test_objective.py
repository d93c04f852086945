"""Token log-probabilities: those of all logits, exact and differentiable; and a loss of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.training.losses import LossConfig
from llmjax.training.objective import OBJECTIVES, make_objective, token_logprobs
from llmjax.training.optim import OptimConfig
from llmjax.training.parameters import combine, split
from llmjax.training.step import loss_and_grad
from tests.gradients import sizes
from tests.models.variants import VARIANTS, batch_of, inputs, weights_of

CONFIG = VARIANTS["llama"]
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def given():
  rng = np.random.default_rng(0)
  values = inputs(CONFIG)
  targets = rng.integers(0, CONFIG.vocab_size, values["tokens"].shape, np.int32)
  return weights_of(CONFIG), batch_of(values, targets_bt=jnp.asarray(targets)), rng


def plain_logprobs(model, batch):
  """All logits, JAX's own log_softmax and an index: no code in common but the model's."""
  logits = model.logits(model.hidden(batch)[0])
  return jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets_bt[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [0, 5, 64])
def test_logprobs_and_their_gradients_are_those_of_all_logits(given, chunk):
  model, batch, rng = given
  weights = jnp.asarray(rng.normal(size=batch.targets_bt.shape), jnp.float32)  # of either sign

  @jax.jit
  def both(model):
    function = lambda model, get: jnp.sum(weights * jnp.sin(get(model, batch)))  # noqa: E731
    chunked = lambda model, batch: token_logprobs(model, batch, chunk)  # noqa: E731
    found, expected = (
      (get(model, batch), jax.grad(function)(model, get)) for get in (chunked, plain_logprobs)
    )
    return found, expected

  (found, grads), (expected, plain) = both(model)
  assert found.dtype == jnp.float32
  # Logs of sums of some 40 exponentials, some 2^4 roundings of 2^-24.
  assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
  for path, grad in tree.flatten(plain).items():
    atol = 5e-6 * max(1e-3, float(np.abs(grad).max()))  # as in test_step.py
    assert_allclose(tree.flatten(grads)[path], grad, rtol=0, atol=atol, err_msg=path)


def test_logits_of_all_positions_never_exist():
  t, v = 48, 400
  config = dataclasses.replace(
    CONFIG, vocab_size=v, max_seq_len=t, mlp_width=32, layers=1, scan=False
  )
  tokens = jnp.zeros((2, t), jnp.int32)
  batch = batch_of({"tokens": tokens}, targets_bt=tokens)

  def largest(chunk):
    function = jax.grad(lambda model: token_logprobs(model, batch, chunk).sum())
    return max(sizes(jax.make_jaxpr(function)(weights_of(config)).jaxpr))

  attention = 2 * 4 * t * t  # its scores, otherwise the largest array
  assert largest(0) == 2 * t * v
  assert largest(12) == max(2 * 12 * v, attention)


def dpo(policy_b, reference_b, beta=0.1):
  """-log σ(β · (difference of policy - reference)), rows chosen, rejected, chosen, …

  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
  """
  gain_b = beta * (policy_b - reference_b)
  return -jax.nn.log_sigmoid(gain_b[0::2] - gain_b[1::2]).mean()


def test_a_preference_loss_is_a_function_of_logprobs(given):
  model, batch, rng = given
  batch = jax.tree.map(lambda a: jnp.concatenate([a, a[::-1]])[:4], batch)
  mask = (rng.random(batch.targets_bt.shape) < 0.6).astype(np.float32)
  reference = np.asarray(rng.normal(size=4) * 3 - 20, np.float32)

  @jax.jit
  @jax.value_and_grad
  def loss(weight):
    changed = tree.unflatten(model, tree.flatten(model) | {"embed/token_vd": weight})
    return dpo(jnp.sum(mask * token_logprobs(changed, batch, 5), 1), reference)

  value, grad = loss(model.embed.token_vd)
  said, slope = np_dpo(np.asarray(jax.jit(plain_logprobs)(model, batch), np.float64), mask,
                       reference)
  assert_allclose(value, said, rtol=1e-5)
  policy = jax.jit(jax.grad(lambda w: jnp.sum(slope * plain_logprobs(
    tree.unflatten(model, tree.flatten(model) | {"embed/token_vd": w}), batch))))
  expected = policy(model.embed.token_vd)
  assert_allclose(grad, expected, rtol=0, atol=5e-6 * float(np.abs(expected).max()))


def np_dpo(logprobs_bt, mask_bt, reference_b, beta=0.1):
  """The loss pair by pair in float64, and its slope by each log-probability."""
  total, slope_bt = 0.0, np.zeros_like(logprobs_bt)
  pairs = len(logprobs_bt) // 2
  for pair in range(pairs):
    good, bad = 2 * pair, 2 * pair + 1
    gains = [beta * (logprobs_bt[i] @ mask_bt[i] - reference_b[i]) for i in (good, bad)]
    margin = gains[0] - gains[1]
    total += np.log1p(np.exp(-margin)) / pairs
    push = beta / (1 + np.exp(margin)) / pairs
    slope_bt[good] -= push * mask_bt[good]
    slope_bt[bad] += push * mask_bt[bad]
  return total, slope_bt


def test_a_frozen_parameter_has_no_gradient_and_the_others_theirs(given):
  model, batch, _ = given
  batch = dataclasses.replace(batch, loss_mask_bt=jnp.ones(batch.targets_bt.shape))
  config = OptimConfig(groups=(("*/mlp/*", None), ("embed/*", None), ("*", {})))
  trainable, frozen = split(model, config.groups)
  leaves = tree.flatten(model).keys()
  assert frozen.keys() == {p for p in leaves if "/mlp/" in p or p.startswith("embed/")}
  assert trainable.keys() == leaves - frozen.keys()
  objective = make_objective("language_model", LossConfig(), batch)
  grad = lambda some: loss_and_grad(combine(model, some, frozen), some, batch, objective, 2)[1]  # noqa: E731
  some, every = jax.jit(grad)(trainable), jax.jit(grad)(tree.flatten(model))
  assert some.keys() == trainable.keys()
  for path, one in some.items():
    assert_allclose(one, every[path], rtol=0, atol=5e-6 * float(np.abs(every[path]).max()))
    assert np.any(one), path


def test_every_task_has_an_objective():
  from llmjax.data.tasks import TASKS

  assert OBJECTIVES.keys() == {*TASKS, ""}
