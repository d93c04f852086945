"""Proves that every kind of model equals the float64 reference: logits, loss and each gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.models.pooling import POOLINGS, pool
from llmjax.training.losses import token_nll
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
from tests.reference.gradient import derivative
from tests.reference.losses import cross_entropy

# At most 4 blocks of sums of at most 64 terms, activations of order 1 to 10: some 2^6 roundings of
# 2^-24 of the logits' largest, which is some 10.
FP32 = 5e-6
# Each activation is rounded to 8 bits; some ten in a row add up as √10 · 2^-9 ≈ 1 %, in a few
# logits three times that.
BF16 = 0.04


@jax.jit
def run(model, batch):
  """(logits, loss, gradients) of the model on a batch with weights."""

  def loss(model):
    logits_btv = model.logits(model.hidden(batch)[0])
    return jnp.sum(token_nll(logits_btv, batch.targets_bt) * batch.loss_mask_bt), logits_btv

  (total, logits_btv), grads = jax.value_and_grad(loss, has_aux=True)(model)
  return logits_btv, total, grads


# Each is close to another that `make test` has.
ALIKE = {"rope_t5", "llava_plain", "vit_mean", "vmoe", "hash", "both_ways", "untied", "mixtral"}


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in VARIANTS],
)
def test_logits_loss_and_gradients_equal_the_reference(name, quick_compile):
  config = VARIANTS[name]
  model, given = weights_of(config), inputs(config)
  targets, counted = scored_places(config, given)
  weights, cfg = values_of(model), reference_config(config)

  def slow(weights):
    return reference.logits(weights, cfg, given)

  logits, loss, grads = run(model, batch_of(given, targets_bt=targets, loss_mask_bt=counted))
  assert logits.dtype == jnp.float32
  real = (given["segments"] if "segments" in given else np.ones(targets.shape)) > 0
  expected = slow(weights)
  tolerance = BF16 if config.dtype == "bfloat16" else FP32
  size = np.abs(expected[real]).max()
  assert size > 0.5  # the comparison is of something
  assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=tolerance * size)
  assert_allclose(loss, cross_entropy(expected, targets, counted)[0], rtol=tolerance)
  if config.dtype == "bfloat16":
    return  # gradients of rounded activations have no exact counterpart
  check_gradients(grads, weights, lambda w: cross_entropy(slow(w), targets, counted)[0], config)


def check_gradients(grads, weights, loss, config):
  """Compares each leaf's gradient along a random direction with central differences."""
  rng = np.random.default_rng(0)
  for path, grad in tree.flatten(grads).items():
    direction = rng.normal(size=grad.shape)
    direction /= np.linalg.norm(direction)
    theirs = derivative(lambda w, path=path: loss({**weights, path: w}), weights[path], direction)
    size = float(jnp.linalg.norm(grad))
    assert size > 1e-4 or unused(path, config), f"{path}: no gradient"
    # A unit direction through a gradient of this norm: its rounding decides, in sums over 24
    # positions of both signs.
    found = np.sum(np.asarray(grad, np.float64) * direction)
    assert_allclose(found, theirs, rtol=0, atol=2e-5 * size + 5e-6, err_msg=path)


def unused(path, config) -> bool:
  """Weights that the loss of this kind never reads, or that shift every score alike."""
  if path.startswith("pooler"):
    return True  # read by one of the poolings alone
  if path.endswith(("moe/bias_e", "moe/noise_de")):
    return True  # moves choices alone; is added in training alone
  return path.endswith("attention/key_bias_kh")  # q · bias is the same for all keys of a query


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].kind == "encoder"])
def test_poolings_equal_the_reference(name, how, quick_compile):
  config = VARIANTS[name]
  model, given = weights_of(config), inputs(config)
  batch = batch_of(given)
  found = pool(model, _features(model, batch), batch.segments_bt > 0, how)
  weights = values_of(model)
  x = reference.features(weights, reference_config(config), given)
  expected = reference.pooled(weights, x, given["segments"], how)
  assert_allclose(found, expected, rtol=0, atol=FP32 * np.abs(expected).max())


@jax.jit
def _features(model, batch):
  return model.features(batch)
