"""Proves that grouped-query attention and its gradient equal loops over heads and queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.nn.attention import Attention, attend
from llmjax.nn.mask import causal_mask
from llmjax.nn.position import rope_angles
from tests.reference import layers
from tests.reference.gradient import derivative, vjp

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
MASK = causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
# Softmax weights and outputs of order 1; scores below 16 in magnitude are off by 16 · 2^-24
# each, and so, relatively, are the weights; sums of at most 16 terms more than double that.
FP32 = dict(rtol=1e-5, atol=5e-6)


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference(q, k, v, keys_of):
  return layers.attention(*(np.asarray(array, np.float64) for array in (q, k, v)), keys_of)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (3, 3), (4, 1)])
def test_attend_forward_and_gradient_equal_the_reference(n, k):
  q, key, v = random(2, 6, n, 4), random(2, 6, k, 4, seed=1), random(2, 6, k, 4, seed=2)
  keys_of = layers.may_look(SEGMENTS, POSITIONS)
  mine, pull_mine = jax.vjp(lambda *qkv: attend(*qkv, MASK), q, key, v)
  grad = random(2, 6, n, 4, seed=3)
  assert_allclose(mine, reference(q, key, v, keys_of), **FP32)
  theirs = vjp(lambda *qkv: layers.attention(*qkv, keys_of), (q, key, v), grad)
  for one, other in zip(pull_mine(grad), theirs, strict=True):
    assert_allclose(one, other, **FP32)


def test_queries_and_keys_may_differ_in_number():
  q, key, v = random(1, 2, 4, 4), random(1, 7, 2, 4, seed=1), random(1, 7, 2, 4, seed=2)
  mask = np.zeros((1, 2, 7), bool)
  mask[0, 0, :3] = mask[0, 1, :4] = True
  theirs = reference(q, key, v, [[list(range(3)), list(range(4))]])
  assert_allclose(attend(q, key, v, jnp.asarray(mask)), theirs, **FP32)


def test_keys_outside_the_mask_have_no_part_at_all():
  q, key, v = random(2, 6, 4, 4), random(2, 6, 2, 4, seed=1), random(2, 6, 2, 4, seed=2)
  # Row 0: document 1 is places 0-2; what document 2 holds must not matter, bit for bit.
  other = attend(q, key.at[0, 3:].set(1e4), v.at[0, 3:].set(-1e4), MASK)
  assert_array_equal(attend(q, key, v, MASK)[0, :3], other[0, :3])


def test_softmax_is_taken_in_fp32_for_bf16_operands():
  q, key, v = (a.astype(jnp.bfloat16) for a in (
    random(2, 6, 4, 4) * 4, random(2, 6, 2, 4, seed=1) * 4, random(2, 6, 2, 4, seed=2)
  ))
  mine = attend(q, key, v, MASK)
  assert mine.dtype == jnp.bfloat16
  exact = reference(q, key, v, layers.may_look(SEGMENTS, POSITIONS))
  # h = 4, so 1/√h is a power of two and scores are exact to fp32. Weights are rounded to bf16
  # (2^-8 of each; they sum to 1, |v| < 4) and so is the result. bf16 scores of magnitude 30 would
  # be off by 0.1.
  assert_allclose(np.asarray(mine, np.float32), exact, rtol=2**-8, atol=4 * 2**-9)


@pytest.fixture(scope="module")
def layer():
  return Attention(jax.random.key(0), {"d": 16, "n": 4, "k": 2, "h": 4}, 0.5)


def test_the_layer_and_its_gradient_equal_the_reference(layer):
  x, grad = random(2, 6, 16), random(2, 6, 16, seed=1)
  names = ("query_dnh", "key_dkh", "value_dkh", "out_nhd")
  weights = {name: np.asarray(getattr(layer, name), np.float64) for name in names}
  weights["x"] = np.asarray(x, np.float64)
  rope = rope_angles(jnp.asarray(POSITIONS), 4, 100.0)
  mine, pull = jax.vjp(lambda f, x: f(x, rope, MASK, jnp.asarray(POSITIONS))[0], layer, x)

  def slow(weights):
    return layers.attention_layer(weights["x"], weights, SEGMENTS, POSITIONS, 100.0)

  assert_allclose(mine, slow(weights), **FP32)
  grads, grad_x = pull(grad)
  found = {name: getattr(grads, name) for name in names} | {"x": grad_x}
  rng = np.random.default_rng(2)
  for name, mine_grad in found.items():
    for _ in range(4):
      # A unit direction, so that the sum over coordinates has the size of one of them.
      direction = rng.normal(size=mine_grad.shape)
      direction /= np.linalg.norm(direction)

      def scalar(w, name=name):
        return np.sum(slow({**weights, name: w}) * np.asarray(grad, np.float64))

      theirs = derivative(scalar, weights[name], direction)
      assert_allclose(np.sum(mine_grad * direction), theirs, err_msg=name, **FP32)
