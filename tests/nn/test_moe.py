"""Proves that a layer of experts equals a loop over tokens and experts, forward and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.nn.moe import Moe, MoeConfig
from tests.reference import experts as reference
from tests.reference.gradient import assert_pulled

DIMS = {"d": 6, "f": 8}
B, T = 2, 7
KEY = jax.random.key(1, impl="rbg")  # the default compiles slowly
REAL = np.array([[1] * 5 + [0] * 2, [1, 1, 0, 1, 1, 1, 1]], bool)
TOKENS = np.random.default_rng(3).integers(0, 99, (B, T)).astype(np.int32)
# As in test_mlp.py: nested sums of at most 8 terms of up to 2^3, of some 2^3 roundings of 2^-24.
FP32 = dict(rtol=5e-6, atol=1e-5)
pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {
  "softmax": (MoeConfig(experts=4, top_k=2), "swiglu"),
  "shared": (MoeConfig(experts=4, top_k=3, width=5, shared=2, router="sigmoid", bias=True), "gelu"),
  "dropping": (MoeConfig(experts=4, top_k=2, capacity=0.6, renormalize=False, noisy=True), "reglu"),
  "expert_choice": (MoeConfig(experts=4, top_k=2, router="expert_choice"), "swiglu"),
  "hash": (MoeConfig(experts=4, top_k=1, router="hash", capacity=0.8), "relu2"),
}


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_of(config, activation) -> Moe:
  """A layer whose weights are all of order one, the bias as well."""
  made = jax.eval_shape(lambda: Moe(jax.random.key(0), DIMS, config, activation, 1.0))
  rng = np.random.default_rng(5)
  make = lambda _, leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, jnp.float32)  # noqa: E731
  return tree.map_with_path(make, made)


def values_of(config, activation) -> dict:
  values = {f"moe.{key}": value for key, value in dataclasses.asdict(config).items()}
  return values | {"activation": activation}


@jax.jit
def run(layer, x, tokens, real, grad):
  """(y, terms, gradients of layer and x)."""
  y, pull, terms = jax.vjp(lambda layer, x: layer(x, tokens, real), layer, x, has_aux=True)
  return y, terms, *pull(grad)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_reference(name):
  config, activation = CASES[name]
  layer, x, grad = layer_of(config, activation), 2 * random(B, T, 6), random(B, T, 6, seed=1)
  y, terms, grads, grad_x = run(layer, x, TOKENS, REAL, grad)
  cfg = values_of(config, activation)
  inputs = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(layer).items()}
  inputs["x"] = x.astype(np.float64)

  def slow(given):
    return reference.moe(given["x"], given, cfg, TOKENS, REAL)[0]

  want, want_terms = reference.moe(inputs["x"], inputs, cfg, TOKENS, REAL)
  assert y.dtype == jnp.float32
  assert_allclose(y, want, **FP32)
  for key, value in want_terms.items():
    assert_allclose(getattr(terms, key), value, err_msg=key, **FP32)
  mine = tree.flatten(grads) | {"x": grad_x}
  for still in {"bias_e", "noise_de"} & mine.keys():
    assert not np.any(mine.pop(still))
  assert_pulled(mine, slow, inputs, grad, rtol=2e-5, atol=1e-4)  # gradients of size up to 50
  if not config.shared:
    assert_array_equal(np.asarray(y)[~REAL], 0)
    assert_array_equal(np.asarray(grad_x)[~REAL], 0)


def to_expert(layer, expert):
  """The layer with a router that scores one expert far above the others, whatever comes."""
  router = jnp.zeros_like(layer.router_de).at[0, expert].set(50)
  return tree.map_with_path(lambda path, leaf: router if "router" in path else leaf, layer)


def test_all_tokens_may_go_to_one_expert_and_others_then_get_no_gradient():
  layer = to_expert(layer_of(MoeConfig(experts=4, top_k=1), "swiglu"), 2)
  x = random(B, T, 6)
  x[..., 0] = 1
  y, terms, grads, _ = run(layer, x, TOKENS, REAL, random(B, T, 6, seed=1))
  assert_array_equal(terms.load_e, [0, 0, REAL.sum(), 0])
  gate, up, down = (getattr(layer, name)[2] for name in ("gate_edf", "up_edf", "down_efd"))
  one = (jax.nn.silu(x @ gate) * (x @ up)) @ down
  assert_allclose(np.asarray(y)[REAL], np.asarray(one)[REAL], **FP32)
  for name in ("gate_edf", "up_edf", "down_efd"):
    grad = np.asarray(getattr(grads, name))
    assert not grad[[0, 1, 3]].any() and grad[2].any(), name


def test_without_padding_given_all_tokens_are_real():
  layer = layer_of(*CASES["softmax"])
  x = jnp.asarray(random(B, T, 6))
  y, terms = jax.jit(lambda layer, x: layer(x))(layer, x)
  again = run(layer, x, TOKENS, np.ones((B, T), bool), x)[0]
  assert_allclose(y, again, **FP32)
  assert float(terms.tokens) == B * T


def test_rows_do_not_know_of_each_other():
  for name in ("dropping", "expert_choice"):
    layer, x = layer_of(*CASES[name]), 2 * random(B, T, 6)
    whole = run(layer, x, TOKENS, REAL, x)[0]
    other = x.copy()
    other[1] = random(T, 6, seed=9)
    again = run(layer, other, TOKENS, REAL, x)[0]
    assert_array_equal(again[0], whole[0])
    assert np.any(again[1] != whole[1])


def test_bf16_stays_bf16_routes_in_fp32_and_has_fp32_gradients():
  layer = layer_of(*CASES["softmax"])
  x = jnp.asarray(random(B, T, 6)).astype(jnp.bfloat16)
  y, terms, grads, grad_x = run(layer, x, TOKENS, REAL, x)
  assert (y.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
  exact = run(layer, x.astype(jnp.float32), TOKENS, REAL, x.astype(jnp.float32))[1]
  for mine, theirs in zip(jax.tree.leaves(terms), jax.tree.leaves(exact), strict=True):
    assert_array_equal(mine, theirs)  # the router saw the same numbers


def test_noise_is_normal_as_wide_as_learned_and_there_in_training_alone():
  layer = layer_of(MoeConfig(experts=4, top_k=2, noisy=True), "relu")
  x = jnp.asarray(random(400, 50, 6))
  still, loud = jax.jit(lambda layer, x: (layer._scores(x, None), layer._scores(x, KEY)))(layer, x)
  assert_allclose(still, x @ layer.router_de, **FP32)
  noise = np.asarray(loud - still) / np.log1p(np.exp(x @ layer.noise_de))
  # Shares below -1, 0 and 1 of 80,000 normal draws: deviations of up to 0.0018; five of them.
  shares = [(noise < bound).mean() for bound in (-1, 0, 1)]
  assert_allclose(shares, [0.158655, 0.5, 0.841345], rtol=0, atol=0.009)
  assert noise.min() < -3.5 and noise.max() > 3.5  # and tails
  # It is learned: a gradient flows to its width.
  loss = lambda layer, x: jnp.sum(layer(x, key=KEY)[0])  # noqa: E731
  assert np.any(jax.jit(jax.grad(loss))(layer, random(B, T, 6)).noise_de)


def test_the_layer_starts_with_the_promised_spread_and_experts_differ():
  config = MoeConfig(experts=8, top_k=2, width=128, shared=2, bias=True, noisy=True)
  layer = jax.jit(lambda: Moe(KEY, {"d": 64, "f": 256}, config, "swiglu", 0.25))()
  expected = {
    "router_de": 64**-0.5, "gate_edf": 64**-0.5, "up_edf": 64**-0.5,
    "down_efd": 0.25 * 128**-0.5,
  }
  for name, std in expected.items():
    leaf = getattr(layer, name)
    # The deviation of N values has itself a relative deviation below 1/√(2N); five of them.
    assert abs(np.std(leaf) / std - 1) < 5 / np.sqrt(2 * leaf.size), name
  assert layer.up_edf.shape == (8, 64, 128) and layer.shared.up_df.shape == (64, 256)
  assert abs(np.corrcoef(layer.up_edf[0].ravel(), layer.up_edf[1].ravel())[0, 1]) < 0.06
  assert not layer.bias_e.any() and not layer.noise_de.any()
