"""Proves that the attention layer and its gradient equal the reference's, with every option."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core.errors import UserError
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.grouped_query import Attention
from llmjax.nn.attention.mask import MaskSpec, cache_mask, cross_mask, self_mask
from llmjax.nn.attention.scores import Bias
from llmjax.nn.attention.variant import AttentionInputs
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig, rope_angles
from tests.reference import layers
from tests.reference.gradient import assert_pulled
from tests.reference.masks import keys_of
from tests.reference.positions import rotary

DIMS = {"d": 12, "n": 4, "k": 2, "h": 4}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
EPS = 1e-2
# Outputs of order 1 to 10; scores below 16 in magnitude are off by 16 · 2^-24 each, and so,
# relatively, are the weights; sums of at most 16 terms, twice over, more than double that.
FP32 = dict(rtol=1e-5, atol=2e-5)
# It is the library that is tested, not XLA's optimizer, which takes as long again.
FAST = {"xla_backend_optimization_level": 0}


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer_of(norm="rms", layout="half", **config):
  """A layer whose every weight is random, what starts as 0 or 1 as well."""
  config = AttentionConfig(**config)
  norm = NormConfig(norm, eps=EPS, bias=norm == "layer")
  make = lambda: Attention(jax.random.key(0), DIMS, config, norm, layout, 0.5)  # noqa: E731
  leaves, tree = jax.tree.flatten(jax.eval_shape(make))
  weights = [random(*x.shape, seed=20 + i) / (2 if x.ndim > 2 else 1) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(tree, weights)


def weights_of(layer):
  """The layer's arrays under the reference's names; works on its gradients too."""
  names = (
    "query_dnh", "key_dkh", "value_dkh", "out_nhd", "query_bias_nh", "key_bias_kh",
    "value_bias_kh", "out_bias_d", "sinks_n",
  )
  found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
  for name in ("query_norm", "key_norm"):
    if hasattr(layer, name):
      (found[name],) = jax.tree.leaves(getattr(layer, name))
      assert found[name].ndim == (1 if layer.config.qk_norm == "head" else 2)
  assert len(found) == len(jax.tree.leaves(layer))
  return found


def turn_of(position, positions, layout):
  """The reference's rotation, of the first `fraction` of the channels."""
  if position is None:
    return None
  r = int(DIMS["h"] * position.fraction)
  angles = [position.theta ** (-2 * i / r) for i in range(r // 2)]
  return lambda heads: rotary(heads, positions, angles=angles, layout=layout)


def check(layer, position, rule, norm="rms", layout="half", bias=None):
  config = layer.config
  x, grad = random(2, 6, 12), random(2, 6, 12, seed=1)
  positions = jnp.asarray(POSITIONS)
  rope = None if position is None else rope_angles(positions, position, DIMS["h"])
  slopes = None if bias is None else Bias(jnp.asarray(bias, jnp.float32))
  mask = self_mask(MaskSpec(**rule), jnp.asarray(SEGMENTS), positions)
  view = AttentionInputs(mask, rope, slopes)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(layer, x, view, grad):
    out, pull = jax.vjp(lambda f, x: f(x, view, positions)[0], layer, x)
    return out, *pull(grad)

  distance = np.abs(POSITIONS[:, None, :] - POSITIONS[:, :, None])
  normed = {"rms": layers.rms_norm, "layer": lambda x, w, e: layers.layer_norm(x, w, 0.0, e)}
  turn = turn_of(position, POSITIONS, layout)

  def slow(w):
    return layers.mixing_layer(
      w["x"], w["x"], w, keys_of(POSITIONS, POSITIONS, rule, SEGMENTS, SEGMENTS),
      turn=turn, turn_source=turn, scale=config.scale or None, softcap=config.softcap,
      norm=None if config.qk_norm == "none" else lambda y, scale: normed[norm](y, scale, EPS),
      bias_bnts=None if bias is None else np.stack([-slope * distance for slope in bias], 1),
    )

  mine, grads, grad_x = run(layer, x, view, grad)
  inputs = weights_of(layer) | {"x": x}
  wide = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
  assert_allclose(mine, slow(wide), **FP32)
  assert_pulled(weights_of(grads) | {"x": grad_x}, slow, inputs, grad, **FP32)


ROPE = PositionConfig(theta=100.0)
HALF = PositionConfig(theta=100.0, fraction=0.5)
CAUSAL = dict(causal=True)


@pytest.mark.parametrize(
  ("config", "position", "rule", "others"),
  [
    (dict(), ROPE, CAUSAL, dict()),
    (dict(bias="qkv", scale=0.3), ROPE, CAUSAL, dict(layout="interleaved")),
    (dict(bias="all", softcap=2.0), None, dict(causal=False), dict(bias=[0.5, 0.25, 0.1, 0.05])),
    (dict(qk_norm="head", sinks=True), ROPE, CAUSAL, dict()),
    (dict(qk_norm="all", bias="qkv"), ROPE, dict(causal=True, window=2), dict()),
    (dict(qk_norm="head", pattern=("window",), window=2), HALF, CAUSAL, dict(norm="layer")),
  ],
  ids=["plain", "qkv bias", "all biases", "norm of heads", "norm of all", "layer norm"],
)
def test_the_layer_and_its_gradient_equal_the_reference(config, position, rule, others):
  made = {name: others[name] for name in ("norm", "layout") if name in others}
  check(layer_of(**made, **config), position, rule, **others)


def test_a_cache_filled_in_pieces_gives_what_the_whole_row_does():
  layer = layer_of(bias="all", qk_norm="head", sinks=True)
  x = random(2, 6, 12)
  positions = jnp.asarray(POSITIONS[[1, 1]])
  rule = MaskSpec(causal=True, window=4)

  def view_of(mask, positions):
    return AttentionInputs(mask, rope_angles(positions, ROPE, 4))

  @functools.partial(jax.jit, compiler_options=FAST)
  def at_once(x):
    return layer(x, view_of(self_mask(rule, None, positions), positions), positions)

  @functools.partial(jax.jit, compiler_options=FAST)
  def step(x, positions, cache):
    mask = cache_mask(rule, positions, jnp.tile(jnp.arange(8), (2, 1)))
    return layer(x, view_of(mask, positions), positions, cache)

  whole, none = at_once(x)
  assert none is None

  cache = KVCache.of(jnp.full((2, 8, 2, 4), 7.0), jnp.full((2, 8, 2, 4), -7.0))
  made = []
  for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
    y, cache = step(x[:, part], positions[:, part], cache)
    made.append(y)
  # The same fp32 sums over 8 slots in place of 6 keys.
  assert_allclose(jnp.concatenate(made, 1), whole, rtol=1e-5, atol=1e-5)
  kept = layer.keys_and_values(x, view_of(None, positions).rope)
  assert_allclose(cache.key_bskh[:, :6], kept.key_bskh, rtol=1e-5, atol=1e-6)
  assert_allclose(cache.value_bskh[:, :6], kept.value_bskh, rtol=1e-5, atol=1e-6)
  assert_array_equal(cache.key_bskh[:, 6:], np.full((2, 2, 2, 4), 7, np.float32))


@pytest.mark.parametrize("qk_norm", ["none", "all"])
def test_looking_at_another_row_equals_the_reference(qk_norm):
  layer = layer_of(bias="all", qk_norm=qk_norm)
  x, memory, grad = random(2, 6, 12), random(2, 5, 12, seed=3), random(2, 6, 12, seed=1)
  source = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
  mask = cross_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), jnp.asarray(source))
  view = AttentionInputs(mask)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(layer, x, memory, grad):
    fast = lambda f, x, memory: f.cross_attend(x, f.keys_and_values(memory), view)  # noqa: E731
    out, pull = jax.vjp(fast, layer, x, memory)
    return out, *pull(grad)

  keys = keys_of(POSITIONS, np.tile(np.arange(5), (2, 1)), {}, SEGMENTS, source)

  def slow(w):
    norm = None if qk_norm == "none" else lambda y, scale: layers.rms_norm(y, scale, EPS)
    return layers.mixing_layer(w["x"], w["memory"], w, keys, norm=norm)

  mine, grads, grad_x, grad_memory = run(layer, x, memory, grad)
  inputs = weights_of(layer) | {"x": x, "memory": memory}
  wide = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
  assert_allclose(mine, slow(wide), **FP32)
  found = weights_of(grads) | {"x": grad_x, "memory": grad_memory}
  assert_pulled(found, slow, inputs, grad, **FP32)


def test_bf16_stays_bf16_and_weight_gradients_fp32():
  layer = layer_of(bias="all", qk_norm="head", sinks=True)
  x = random(2, 6, 12).astype(jnp.bfloat16)
  positions = jnp.asarray(POSITIONS)
  mask = self_mask(MaskSpec(), jnp.asarray(SEGMENTS), positions)
  view = AttentionInputs(mask, rope_angles(positions, ROPE, 4))

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(layer, x):
    out, pull = jax.vjp(lambda f, x: f(x, view, positions)[0], layer, x)
    return out, *pull(out)

  out, grads, grad_x = run(layer, x)
  assert (out.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_the_kernel_and_the_block_reach_the_product(monkeypatch):
  seen = []
  def took(q, k, v, mask, scores, kernel, block):
    seen.append((kernel, block))
    return q

  monkeypatch.setattr("llmjax.nn.attention.context.attend", took)
  view = AttentionInputs(self_mask(MaskSpec(), None, jnp.asarray(POSITIONS)))
  layer = layer_of(kernel="blockwise", block=32)
  layer(random(2, 6, 12), view, jnp.asarray(POSITIONS))
  assert seen == [("blockwise", 32)]


def test_weights_start_with_the_promised_spread():
  dims = {"d": 64, "n": 8, "k": 4, "h": 32}
  config = AttentionConfig(bias="all", sinks=True, qk_norm="all")
  make = lambda: Attention(jax.random.key(0), dims, config, NormConfig(), "half", 0.25)  # noqa: E731
  layer = jax.jit(make)()
  # The sample deviation of N values has itself a relative deviation below 1/√(2N); five of them.
  for name, std in {
    "query_dnh": 64**-0.5, "key_dkh": 64**-0.5, "value_dkh": 64**-0.5, "out_nhd": 0.25 / 16
  }.items():
    weight = np.asarray(getattr(layer, name))
    assert abs(weight.std() / std - 1) < 5 / np.sqrt(2 * weight.size)
  for name in ("query_bias_nh", "key_bias_kh", "value_bias_kh", "out_bias_d", "sinks_n"):
    assert not np.asarray(getattr(layer, name)).any()
  assert layer.query_norm.scale_nh.shape == (8, 32) and layer.key_norm.scale_kh.shape == (4, 32)


def test_each_kind_of_layer_has_its_rule():
  config = AttentionConfig(
    pattern=("full", "window", "sparse"), window=9, sparse_block=16, sparse_local=3,
    sparse_global=2, sparse_stride=4,
  )
  assert config.rule("full", True) == MaskSpec(True)
  assert config.rule("full", False) == MaskSpec(False)
  assert config.rule("window", True) == MaskSpec(True, window=9)
  sparse = MaskSpec(False, sparse_block=16, sparse_local=3, sparse_global=2, sparse_stride=4)
  assert config.rule("sparse", False) == sparse
  assert dataclasses.asdict(config.rule("window", False))["sparse_block"] == 0


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(mask="casual"), r"mask 'casual' is unknown; did you mean 'causal'\?"),
    (dict(qk_norm="heads"), r"qk_norm 'heads' is unknown; did you mean 'head'\?"),
    (dict(bias="some"), r"bias 'some' is unknown"),
    (dict(kernel="flash"), r"kernel 'flash' is unknown; did you mean 'splash'\?"),
    (dict(pattern=("full", "windows"), window=4), r"pattern 'windows' is unknown"),
    (dict(pattern=()), r"pattern is empty"),
    (dict(window=4), r"window 4 and pattern \('full',\) do not go together"),
    (dict(pattern=("window",)), r"window 0 and pattern \('window',\) do not go together"),
    (dict(window=-1), r"window -1 is less than 0"),
    (dict(sparse_block=0), r"sparse_block 0 is less than 1"),
    (dict(sparse_local=0), r"sparse_local 0 is less than 1"),
    (dict(softcap=-1.0), r"softcap -1\.0 is less than 0"),
    (dict(scale=-1.0), r"scale -1\.0 is less than 0"),
    (dict(block=8), r"block 8 is less than 16"),
  ],
)
def test_a_wrong_config_is_one_sentence(wrong, message):
  with pytest.raises(UserError, match=rf"^model\.attention\.{message}") as caught:
    AttentionConfig(**wrong)
  assert "\n" not in str(caught.value)
