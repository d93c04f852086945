"""Proves that the loss in chunks is the loss of all logits, value and gradient, and needs none of
them at once; and its terms against the reference.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.nn.embed import Embed, EmbedConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.training.head import head_loss
from llmjax.training.losses import LossConfig, logits_loss
from tests.gradients import loss_and_grad, sizes
from tests.models.variants import (
  VARIANTS,
  batch_of,
  inputs,
  reference_config,
  scored_places,
  values_of,
  weights_of,
)
from tests.reference import decoder as reference
from tests.reference import losses as slow
from tests.reference.gradient import derivative, vjp

B, T, D, V = 2, 20, 8, 24
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
# Weights of every size, some of them zero, as masks and as weights of examples.
WEIGHTS = (RNG.random((B, T)) * (RNG.random((B, T)) < 0.7)).astype(np.float32)
TERMS = LossConfig(z_loss=0.02, label_smoothing=0.1, chunk=0)
PLAIN = LossConfig(chunk=0)
# Sums of 24 exponentials and of 40 losses near 5: some 2^4 roundings of 2^-24.
FP32 = dict(rtol=2e-6, atol=2e-6)
pytestmark = pytest.mark.usefixtures("quick_compile")


def head():
  dims = {"v": V, "d": D, "t": T, "i": 1}
  config = EmbedConfig(head_bias=True, logit_softcap=4.0)
  made = Embed(
    jax.random.key(0), dims, config, PositionConfig(), NormConfig(), tied=True
  )
  return jax.tree.map(lambda leaf: leaf * 30 + 0.1, made)


def whole(config, head, x, targets=TARGETS, weights=WEIGHTS):
  """The objective of all logits at once, by JAX's own gradient."""
  return logits_loss(head.logits(x), targets, weights, config)


@pytest.mark.parametrize("terms", [PLAIN, TERMS], ids=["plain", "terms"])
# Of 20 positions: runs that divide them and that do not, one run and a rest, more than there are.
@pytest.mark.parametrize("chunk", [5, 7, 2, 12, 64])
def test_chunks_give_the_objective_and_gradient_of_all_logits(terms, chunk):
  config = dataclasses.replace(terms, chunk=chunk)

  @jax.jit
  def both(head, x):
    chunked = jax.value_and_grad(
      lambda head, x: head_loss(config, head, x, TARGETS, WEIGHTS), (0, 1), has_aux=True
    )
    plain = jax.value_and_grad(lambda head, x: whole(terms, head, x), (0, 1), has_aux=True)
    return chunked(head, x), plain(head, x), head_loss(config, head, x, TARGETS, WEIGHTS)

  found, expected, without_gradient = both(head(), X)
  assert_allclose(found[0], expected[0], **FP32)
  assert_allclose(without_gradient, expected[0], **FP32)
  for path, grad in tree.flatten(expected[1]).items():
    other = tree.flatten(found[1])[path]
    atol = 2e-6 * max(1.0, float(np.abs(grad).max()))
    assert_allclose(other, grad, rtol=0, atol=atol, err_msg=path)


def test_an_incoming_gradient_scales_it():
  config = dataclasses.replace(TERMS, chunk=5)
  grad = lambda factor: jax.grad(  # noqa: E731
    lambda x: factor * head_loss(config, head(), x, TARGETS, WEIGHTS)[0]
  )(X)
  assert_allclose(grad(3.0), 3 * grad(1.0), rtol=1e-6)


def test_terms_and_their_gradient_equal_the_reference():
  logits = jnp.asarray(RNG.normal(size=(2, 3, 7)) * 3, jnp.float32)
  targets, weights = TARGETS[:, :3] % 7, WEIGHTS[:, :3]
  for smoothing, z_loss in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.2, 0.1)):
    config = LossConfig(z_loss=z_loss, label_smoothing=smoothing)
    (total, nll), pull = jax.vjp(lambda a, c=config: logits_loss(a, targets, weights, c), logits)
    args = (targets, weights, smoothing, z_loss)
    assert_allclose(total, slow.objective(np.asarray(logits), *args), **FP32)
    assert_allclose(nll, slow.cross_entropy(logits, targets, weights)[0], **FP32)
    (expected,) = vjp(lambda a, args=args: slow.objective(a, *args), [logits], 1.0)
    # z-loss: 2 · 0.5 · log-sum of about 5, so gradients of up to 5.
    assert_allclose(pull((jnp.float32(1), jnp.float32(0)))[0], expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reports_cross_entropy_and_differentiates_the_objective(accumulation):
  config = VARIANTS["llama"]
  given = inputs(config)
  targets, weights = scored_places(config, given)
  weights[1] *= 3  # micro-batches that weigh differently
  model, batch = weights_of(config), batch_of(given, targets_bt=targets, loss_mask_bt=weights)
  terms = dataclasses.replace(TERMS, chunk=5)
  run = jax.jit(loss_and_grad, static_argnums=(2, 3))
  loss, grads, count, _ = run(model, batch, accumulation, terms)
  values, cfg = values_of(model), reference_config(config)

  def mean(values):
    logits = reference.logits(values, cfg, given)
    total = slow.objective(logits, targets, weights, terms.label_smoothing, terms.z_loss)
    return total / weights.sum()

  logits = reference.logits(values, cfg, given)
  nll, _ = slow.cross_entropy(logits, targets, weights)
  assert_allclose(count, weights.sum(), rtol=1e-6)
  assert_allclose(loss, nll / weights.sum(), rtol=5e-6)
  assert abs(mean(values) - nll / weights.sum()) > 0.01  # the terms are there, and not reported
  rng = np.random.default_rng(0)
  for path, grad in tree.flatten(grads).items():
    direction = rng.normal(size=grad.shape)
    direction /= np.linalg.norm(direction)
    theirs = derivative(lambda w, path=path: mean({**values, path: w}), values[path], direction)
    found = np.sum(np.asarray(grad, np.float64) * direction)
    # As in tests/models/test_variants.py.
    size = float(jnp.linalg.norm(grad))
    assert_allclose(found, theirs, rtol=0, atol=2e-5 * size + 1e-6, err_msg=path)


def step(chunk, t=48, v=400):
  """A gradient step of a model whose logits would be by far its largest array."""
  values = {"vocab_size": v, "max_seq_len": t, "mlp_width": 32, "layers": 1, "scan": False}
  config = dataclasses.replace(VARIANTS["llama"], **values)
  tokens = jnp.zeros((2, t), jnp.int32)
  batch = batch_of({"tokens": tokens}, targets_bt=tokens, loss_mask_bt=jnp.ones((2, t)))
  loss = LossConfig(chunk=chunk)
  return (lambda model: loss_and_grad(model, batch, 1, loss)), weights_of(config)


@pytest.mark.parametrize("chunk", [24, 12, 4])
def test_logits_of_a_whole_batch_never_exist(chunk):
  function, model = step(chunk)
  attention = 2 * 4 * 48 * 48  # its scores, otherwise the largest
  largest = max(sizes(jax.make_jaxpr(function)(model).jaxpr))
  assert largest == max(2 * chunk * 400, attention)
  whole, model = step(0)
  assert max(sizes(jax.make_jaxpr(whole)(model).jaxpr)) == 2 * 48 * 400


def test_memory_falls_with_the_chunk():
  def temporary(chunk):
    function, model = step(chunk, t=64, v=2000)
    return jax.jit(function).lower(model).compile().memory_analysis().temp_size_in_bytes

  whole, halves, small = temporary(0), temporary(32), temporary(4)
  logits = 2 * 64 * 2000 * 4
  # All logits and their gradient, against half of them, against a sixteenth.
  assert whole - halves > logits / 2
  assert halves - small > logits / 4


@pytest.mark.parametrize(
  ("values", "says"),
  [
    ({"label_smoothing": 1.0}, r"loss.label_smoothing 1.0 is not in \[0, 1\)"),
    ({"z_loss": -0.1}, "loss.z_loss -0.1 is less than 0"),
    ({"chunk": -1}, "loss.chunk -1 is less than 0"),
  ],
)
def test_values_out_of_range_are_user_errors(values, says):
  with pytest.raises(UserError, match=says):
    LossConfig(**values)
