"""Proves that splash (interpreted) and what cuDNN is given (run by XLA) equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from numpy.testing import assert_allclose

from llmjax.nn.attention.mask import MaskSpec, self_mask
from llmjax.nn.attention.platform_kernels import _splash_local, cudnn
from llmjax.nn.attention.scores import Bias, Scores
from tests.reference import layers
from tests.reference.gradient import assert_pulled
from tests.reference.masks import keys_of

# It is the library that is tested, not XLA's optimizer, which takes longest of all.
FAST = {"xla_backend_optimization_level": 0}


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def wide(inputs):
  return {name: np.asarray(x, np.float64) for name, x in inputs.items()}


# Two tiles of 128, so that rules skip one and cut through others; documents end within tiles.
LENGTHS = [[100, 130, 26], [30, 226, 0]]
SEGMENTS = np.stack([np.repeat([1, 2, 3], row) for row in LENGTHS])
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in row]) for row in LENGTHS])
SPLASH = {
  "causal, packed, sinks": (dict(causal=True), True, 0.0, True),
  "window, soft cap": (dict(causal=True, window=70), False, 2.0, False),
  "full, packed, sinks": (dict(causal=False), True, 0.0, True),
  "window both ways": (dict(causal=False, window=70), False, 0.0, False),
}


@pytest.mark.parametrize(
  ("rule", "packed", "softcap", "sinks"),
  [
    # What "full, packed, sinks" asks for, the first and the last ask for together.
    pytest.param(*case, id=name, marks=[pytest.mark.slow] * name.startswith("full"))
    for name, case in SPLASH.items()
  ],
)
def test_splash_and_its_gradient_equal_the_reference(rule, packed, softcap, sinks):
  inputs = {"q": random(2, 256, 2, 64), "k": random(2, 256, 1, 64, seed=1)}
  inputs["v"] = random(2, 256, 1, 64, seed=2)
  if sinks:
    inputs["sinks"] = random(2, seed=3)
  grad = random(2, 256, 2, 64, seed=4)
  # A block of 16 is below the kernel's 128 and must not reach it.
  kernel = functools.partial(
    _splash_local, rule=MaskSpec(**rule), scale=0.125, softcap=softcap, block=16, interpret=True
  )
  segments = jnp.asarray(SEGMENTS) if packed else None

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(inputs, grad):
    def fast(x):
      return kernel(x["q"], x["k"], x["v"], segments, x.get("sinks"))

    out, pull = jax.vjp(fast, inputs)
    return out, *pull(grad)

  places = np.tile(np.arange(256), (2, 1))
  positions = POSITIONS if packed else places
  keys = keys_of(positions, positions, rule, *([SEGMENTS] * 2 if packed else ()))

  def slow(x):
    return layers.attention(
      x["q"], x["k"], x["v"], keys, scale=0.125, softcap=softcap, sinks_n=x.get("sinks")
    )

  mine, grads = run(inputs, grad)
  # As in test_kernels.py; gradients of keys and sinks are sums over up to 256 queries.
  assert_allclose(mine, slow(wide(inputs)), rtol=1e-5, atol=5e-6)
  assert_pulled(grads, slow, inputs, grad, count=1, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("names", "forward"), [((), 2), (("attention",), 1)])
def test_a_layer_that_saves_attention_takes_splash_forward_once(names, forward):
  kernel = functools.partial(
    _splash_local, rule=MaskSpec(causal=True), scale=1.0, softcap=0.0, block=128, interpret=True
  )

  def layer(q):
    return kernel(jnp.sin(q), jnp.sin(q), jnp.sin(q), None, None).sum()

  policy = jax.checkpoint_policies.save_only_these_names(*names)
  both = jax.value_and_grad(jax.checkpoint(layer, policy=policy))
  program = jax.make_jaxpr(both)(random(1, 128, 1, 64)).jaxpr
  made = str(dce_jaxpr(program, [True] * len(program.outvars))[0])  # what nobody reads is not run
  assert made.count("name=splash_mha_fwd") == forward
  assert made.count("name=splash_mha_dq") == made.count("name=splash_mha_dkv") == 1


T = 12
DOCUMENTS = np.array([[1] * 7 + [2] * 5, [1] * 12])
PLACES = np.array([[*range(7), *range(5)], [*range(12)]])
PREFIX = PLACES < 3
CUDNN = {
  "by rule, causal": (dict(causal=True), False, False),
  "by rule, full": (dict(causal=False), False, False),
  "by rule, window": (dict(causal=True, window=4), False, False),
  "as an array, window both ways": (dict(causal=False, window=4), False, False),
  "as an array, packed": (dict(causal=True), True, False),
  "as an array, window, packed, prefix": (dict(causal=True, window=3), True, True),
  "as an array, sparse": (dict(causal=True, sparse_block=2, sparse_local=2), False, False),
}


def mask_of(rule, packed, prefix):
  positions = PLACES if packed else PLACES[[1, 1]]
  parts = (DOCUMENTS if packed else None, PREFIX if prefix else None)
  keys = keys_of(positions, positions, rule, parts[0], parts[0], parts[1])
  parts = [None if part is None else jnp.asarray(part) for part in parts]
  return self_mask(MaskSpec(**rule), parts[0], jnp.asarray(positions), parts[1]), keys, positions


@pytest.mark.parametrize(("rule", "packed", "prefix"), CUDNN.values(), ids=CUDNN)
def test_what_cudnn_is_given_means_what_the_reference_does(rule, packed, prefix):
  slopes = bool(rule.get("window")) or packed
  mask, keys, positions = mask_of(rule, packed, prefix)
  inputs = {"q": random(2, T, 4, 8), "k": random(2, T, 2, 8, seed=1)}
  inputs["v"] = random(2, T, 2, 8, seed=2)
  grad = random(2, T, 4, 8, seed=3)
  scores = Scores(0.3, bias=Bias(2.0 ** -jnp.arange(1, 5)) if slopes else None)
  distance = np.abs(positions[:, None, :] - positions[:, :, None])
  bias = np.stack([-(2.0**-head) * distance for head in range(1, 5)], 1) if slopes else None

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(inputs, grad, mask):
    def fast(x):
      return cudnn(x["q"], x["k"], x["v"], mask, scores, implementation="xla")

    out, pull = jax.vjp(fast, inputs)
    return out, *pull(grad)

  def slow(x):
    return layers.attention(x["q"], x["k"], x["v"], keys, scale=0.3, bias_bnts=bias)

  mine, grads = run(inputs, grad, mask)
  assert_allclose(mine, slow(wide(inputs)), rtol=1e-5, atol=5e-6)
  assert_pulled(grads, slow, inputs, grad, count=2, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("rule", "packed", "prefix"), CUDNN.values(), ids=CUDNN)
def test_cudnn_itself_refuses_none_of_it_before_it_looks_for_the_gpu(rule, packed, prefix):
  mask, _, _ = mask_of(rule, packed, prefix)
  x = jnp.zeros((2, T, 2, 8), jnp.bfloat16)
  # Where jax's own checks of the arguments pass, the next thing it misses is cuDNN.
  with pytest.raises(RuntimeError, match=r"(?i)cudnn is not detected"):
    cudnn(x, x, x, mask, Scores(0.3))
