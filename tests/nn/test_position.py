"""Proves that rotary positions, their scalings, sinusoids and biases are those of their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core.errors import UserError
from llmjax.nn.attention.scores import Bias, alibi_slopes, relative_bucket
from llmjax.nn.position import (
  PositionConfig,
  rope_angles,
  rope_frequencies,
  rotate,
  sinusoids,
)
from tests.reference import positions as reference
from tests.reference.gradient import vjp

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
GRAD = jnp.asarray(RNG.normal(size=(2, 5, 3, 8)), jnp.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 7, 30]])
# An angle of at most 30 rad is off by 30 · 2^-23 (theta's power and the product are each rounded),
# and |x| < 4.
ANGLE = dict(rtol=0, atol=4 * 30 * 2**-23)
# Both sides are float64 powers and logarithms, in another order.
FLOAT64 = dict(rtol=1e-12, atol=0)


@jax.jit
def turn_by(x, angles):
  return rotate(x, *angles)


def turn(x, positions, theta, **config):
  return turn_by(x, rope_angles(positions, PositionConfig(theta=theta, **config), x.shape[-1]))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("theta", "fraction", "on"), [
  (10_000.0, 1.0, "cpu"), (50.0, 1.0, "cpu"), (50.0, 0.5, "cpu"), (50.0, 0.5, "tpu"),
])
def test_forward_and_gradient_equal_the_reference(theta, fraction, on, layout, monkeypatch):
  monkeypatch.setattr("llmjax.nn.position.platform", lambda: on)
  config = PositionConfig(theta=theta, fraction=fraction, layout=layout)
  r = int(8 * fraction)

  @jax.jit
  def run(x, grad):
    angles = rope_angles(POSITIONS, config, 8)
    out, pull = jax.vjp(lambda x: rotate(x, *angles, layout), x)
    return out, *pull(grad)

  def slow(x):
    angles = [theta ** (-2 * i / r) for i in range(r // 2)]
    return reference.rotary(x, POSITIONS, angles=angles, layout=layout)

  mine, mine_grad = run(X, GRAD)
  assert_allclose(mine, slow(np.asarray(X, np.float64)), **ANGLE)
  assert_allclose(mine_grad, vjp(slow, [X], GRAD)[0], **ANGLE)
  assert_array_equal(mine[..., r:], X[..., r:])


@pytest.mark.parametrize(("width", "fraction", "turned"), [(8, 0.4, 4), (80, 0.4, 32), (64, 1, 64)])
def test_the_part_that_turns_is_even_and_an_odd_one_is_rounded_up(width, fraction, turned):
  config = PositionConfig(fraction=fraction)
  assert config.rotary_dim(width) == turned
  assert rope_frequencies(config, width).shape == (turned // 2,)


def test_angles_far_out_are_those_of_float64_to_fp32_rounding_of_the_angle():
  cos, sin = rope_angles(jnp.array([[100_000]]), PositionConfig(), 8)
  angles = 100_000 * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
  # The frequency and the product each round by 2^-24 of the angle; cos and sin have their own.
  for mine, theirs in ((cos, np.cos(angles)), (sin, np.sin(angles))):
    error = np.abs(np.asarray(mine[0, 0], np.float64) - theirs)
    assert (error <= angles * 2**-24 * 2.1 + 2**-22).all()


def test_position_zero_turns_nothing():
  assert_allclose(turn(X, jnp.zeros((2, 5), jnp.int32), 10_000.0), X, rtol=0, atol=0)


def test_scores_depend_on_distance_alone():
  def score(shift):
    q = turn(X[:, :1], jnp.full((2, 1), 9 + shift), 100.0)
    k = turn(X[:, 1:2], jnp.full((2, 1), 4 + shift), 100.0)
    return jnp.sum(q * k, axis=-1)

  # Angles of at most 40 rad, off by 40 · 2^-23 each; 8 products of magnitude below 8.
  assert_allclose(score(31), score(0), rtol=0, atol=8 * 8 * 40 * 2**-23)
  assert np.abs(score(0) - jnp.sum(X[:, :1] * X[:, 1:2], axis=-1)).max() > 0.1


def test_turning_keeps_the_norm_and_the_dtype():
  turned = turn(X, POSITIONS, 10_000.0)
  # cos² + sin² is 1 to fp32 rounding; sums of 8 squares.
  assert_allclose(jnp.sum(turned**2, -1), jnp.sum(X**2, -1), rtol=1e-6)
  assert turn(X.astype(jnp.bfloat16), POSITIONS, 10_000.0).dtype == jnp.bfloat16


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("r", [8, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_every_scaling_equals_its_reference(factor, r, theta):
  def mine(scaling, **given):
    config = PositionConfig(theta=theta, scaling=scaling, factor=factor, **given)
    return rope_frequencies(config, r)

  long = dict(original_context=8192)
  assert_allclose(mine("linear"), reference.linear(theta, r, factor), **FLOAT64)
  assert_allclose(mine("ntk"), reference.ntk(theta, r, factor), **FLOAT64)
  yarn = reference.yarn(theta, r, factor, 8192, 32.0, 1.0)
  assert_allclose(mine("yarn", **long), yarn, **FLOAT64)
  short = dict(original_context=2048, beta_fast=20.0, beta_slow=2.0)
  yarn = reference.yarn(theta, r, factor, 2048, 20.0, 2.0)
  assert_allclose(mine("yarn", **short), yarn, **FLOAT64)
  llama3 = reference.llama3(theta, r, factor, 8192, 1.0, 4.0)
  assert_allclose(mine("llama3", **long), llama3, **FLOAT64)


def test_yarn_is_the_papers_outside_its_ramp_and_falls_within():
  config = PositionConfig(scaling="yarn", factor=16.0, original_context=4096)
  plain = rope_frequencies(PositionConfig(), 128)
  shrunk = plain / rope_frequencies(config, 128)
  turns = 4096 * plain / (2 * np.pi)
  assert_allclose(shrunk[turns > 32], 1, rtol=1e-12)
  assert_allclose(shrunk[turns < 1], 16, rtol=1e-12)
  assert (np.diff(shrunk) >= 0).all() and ((shrunk > 1.01) & (shrunk < 15.9)).sum() > 10


def test_ntk_leaves_the_first_pair_and_stretches_the_last_by_the_factor():
  plain = rope_frequencies(PositionConfig(), 64)
  scaled = rope_frequencies(PositionConfig(scaling="ntk", factor=4.0), 64)
  assert scaled[0] == plain[0]
  assert_allclose(scaled[-1], plain[-1] / 4, **FLOAT64)
  with pytest.raises(UserError, match="ntk needs more than 2 rotary channels"):
    PositionConfig(scaling="ntk", factor=4.0, fraction=0.25).check(8)


@pytest.mark.parametrize(("given", "expected"), [(0.0, 0.1 * np.log(4) + 1), (1.5, 1.5)])
def test_yarn_lengthens_queries_and_keys(given, expected):
  config = PositionConfig(
    scaling="yarn", factor=4.0, original_context=64, attention_factor=given, local_theta=100.0
  )
  cos, sin = rope_angles(jnp.asarray(POSITIONS), config, 8)
  assert_allclose(jnp.sqrt(cos**2 + sin**2), np.full(cos.shape, expected), rtol=1e-6)
  angles = reference.yarn(10_000.0, 8, 4.0, 64, 32.0, 1.0)
  slow = reference.rotary(
    np.asarray(X, np.float64), POSITIONS, angles=angles, stretch=expected
  )
  assert_allclose(rotate(X, cos, sin), slow, **ANGLE)
  cos, sin = rope_angles(jnp.asarray(POSITIONS), config, 8, local=True)
  assert_allclose(jnp.sqrt(cos**2 + sin**2), np.ones(cos.shape), rtol=1e-6)


def test_window_layers_have_a_base_of_their_own_without_scaling():
  config = PositionConfig(scaling="linear", factor=8.0, theta=1e6, local_theta=1e4)
  assert_allclose(
    rope_frequencies(config, 16, local=True), [1e4 ** (-2 * i / 16) for i in range(8)], **FLOAT64
  )
  assert_allclose(rope_frequencies(config, 16), reference.linear(1e6, 16, 8.0), **FLOAT64)
  same = PositionConfig(scaling="linear", factor=8.0, theta=1e6)
  assert_array_equal(rope_frequencies(same, 16, local=True), rope_frequencies(same, 16))


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_equal_the_reference(width):
  config = PositionConfig(kind="sinusoidal", theta=100.0)
  mine = sinusoids(jnp.asarray(POSITIONS), width, config)
  theirs = [[reference.sinusoid(p, width, 100.0) for p in row] for row in POSITIONS.tolist()]
  assert mine.dtype == jnp.float32
  assert_allclose(mine, theirs, rtol=0, atol=30 * 2**-23)


def test_other_orders_of_sinusoids_are_those_of_marian_and_tensor2tensor():
  """Marian: PE[j] = sin(p / θ^(2j/d)), PE[d/2 + j] its cosine. Tensor2Tensor: of d/2 timescales
  1 … θ, evenly apart in their logarithms. OpenNMT counts positions from 1."""
  places = jnp.asarray([[0, 1, 5]])
  halves = sinusoids(places, 8, PositionConfig(kind="sinusoidal_halves", theta=100.0))[0]
  for row, p in zip(halves, (0, 1, 5), strict=True):
    want = [f(p / 100 ** (2 * j / 8)) for f in (math.sin, math.cos) for j in range(4)]
    assert_allclose(row, want, rtol=0, atol=8 * 2**-23)
  t2t = PositionConfig(kind="sinusoidal_t2t", theta=1000.0, first=1)
  for row, p in zip(sinusoids(places, 8, t2t)[0], (1, 2, 6), strict=True):
    want = [f(p / scale) for f in (math.sin, math.cos) for scale in (1, 10, 100, 1000)]
    assert_allclose(row, want, rtol=0, atol=8 * 2**-23)


def test_alibi_slopes_are_the_papers():
  # The paper's own example, sec. 3: 8 heads have 1/2, 1/4 … 1/256; 16 go down by √2.
  assert_array_equal(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
  assert_allclose(alibi_slopes(16), [2 ** (-0.5 * i) for i in range(1, 17)], **FLOAT64)
  assert_allclose(alibi_slopes(12)[8:], [2 ** (-0.5 * i) for i in (1, 3, 5, 7)], **FLOAT64)
  for heads in range(1, 40):
    assert_allclose(alibi_slopes(heads), reference.alibi_slopes(heads), **FLOAT64)


@pytest.mark.parametrize("both_ways", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize(
  ("buckets", "far"), [(32, 128), (8, 16), (8, 64), (64, 512), (12, 100), (4, 3), (5, 9)]
)
def test_every_distance_falls_into_its_bucket(buckets, far, both_ways):
  # Edges such as 16, 32 and 64 of (32, 128) are exact powers, where a rounded log could slip.
  distances = np.arange(-1500, 1501)
  mine = relative_bucket(jnp.asarray(distances), buckets, far, both_ways)
  theirs = [reference.relative_bucket(int(d), buckets, far, both_ways) for d in distances]
  assert mine.dtype == jnp.int32
  assert_array_equal(mine, theirs)


def test_buckets_in_numbers():
  # T5's own: 32 buckets up to 128, 16 a side, 8 of them exact; 16 keys back is two steps further.
  mine = relative_bucket(jnp.array([0, -1, 1, -7, -8, -15, -16, -127, -500, 500]), 32, 128, True)
  assert mine.tolist() == [0, 1, 17, 7, 8, 9, 10, 15, 15, 31]
  mine = relative_bucket(jnp.array([5, 0, -1, -15, -16, -127, -128, -900]), 32, 128, False)
  assert mine.tolist() == [0, 0, 1, 15, 16, 31, 31, 31]


Q_POSITIONS, K_POSITIONS = np.array([[3, 9], [0, 2]]), np.array([[0, 3, 5, 40], [1, 2, 3, 0]])


def test_slopes_are_taken_by_distance_both_ways():
  slopes = np.array([0.5, 0.25, 0.125], np.float32)
  mine = Bias(jnp.asarray(slopes)).scores(jnp.asarray(Q_POSITIONS), jnp.asarray(K_POSITIONS))
  assert mine.shape == (2, 3, 2, 4) and mine.dtype == jnp.float32
  for row, head, t, s in np.ndindex(mine.shape):
    assert mine[row, head, t, s] == -slopes[head] * abs(Q_POSITIONS[row, t] - K_POSITIONS[row, s])


@pytest.mark.parametrize("both_ways", [True, False], ids=["both ways", "one way"])
def test_the_table_is_read_by_bucket_and_its_gradient_summed_by_bucket(both_ways):
  table = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
  grad = jnp.asarray(RNG.normal(size=(2, 3, 2, 4)), jnp.float32)

  def fast(table):
    bias = Bias(None, table, 20, both_ways)
    return bias.scores(jnp.asarray(Q_POSITIONS), jnp.asarray(K_POSITIONS))

  expected, expected_grad = np.empty((2, 3, 2, 4)), np.zeros((8, 3))
  for row, head, t, s in np.ndindex(expected.shape):
    distance = int(K_POSITIONS[row, s] - Q_POSITIONS[row, t])
    bucket = reference.relative_bucket(distance, 8, 20, both_ways)
    expected[row, head, t, s] = table[bucket, head]
    expected_grad[bucket, head] += grad[row, head, t, s]
  mine, pull = jax.vjp(fast, table)
  assert_array_equal(mine, expected.astype(np.float32))
  # Sums of at most 16 numbers of order 1.
  assert_allclose(pull(grad)[0], expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(kind="rotary"), r"kind 'rotary' is unknown"),
    (dict(layout="halves"), r"layout 'halves' is unknown; did you mean 'half'\?"),
    (dict(scaling="lama3"), r"scaling 'lama3' is unknown; did you mean 'llama3'\?"),
    (dict(factor=0.5), r"factor 0\.5 is less than 1"),
    (dict(attention_factor=-1.0), r"attention_factor -1\.0 is less than 0"),
    (dict(buckets=3), r"buckets 3 is less than 4"),
    (dict(buckets=32, max_distance=16), r"max_distance 16 is less than 17"),
    (dict(theta=1.0), r"theta 1\.0 is not above 1"),
    (dict(local_theta=0.5), r"local_theta 0\.5 is neither 0 nor above 1"),
    (dict(fraction=0.0), r"fraction 0\.0 is not in \(0, 1\]"),
    (dict(fraction=1.5), r"fraction 1\.5 is not in \(0, 1\]"),
    (dict(scaling="yarn"), r"scaling=yarn needs original_context"),
    (dict(scaling="llama3"), r"scaling=llama3 needs original_context"),
    (
      dict(scaling="llama3", original_context=8, low_freq_factor=4.0),
      r"high_freq_factor 4\.0 is not above low_freq_factor 4\.0",
    ),
    (
      dict(scaling="yarn", original_context=8, beta_slow=32.0),
      r"beta_fast 32\.0 and beta_slow 32\.0 are not in order",
    ),
  ],
)
def test_a_wrong_config_is_one_sentence(wrong, message):
  with pytest.raises(UserError, match=rf"^model\.position\.{message}") as caught:
    PositionConfig(**wrong)
  assert "\n" not in str(caught.value)
