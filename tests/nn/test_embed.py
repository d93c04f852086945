"""Proves that embedding and head do what their config says, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import take
from llmjax.core.errors import UserError
from llmjax.nn.embed import Embed, EmbedConfig, take_rows
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from tests.reference import layers
from tests.reference.gradient import assert_pulled
from tests.reference.positions import sinusoid

DIMS = {"v": 11, "d": 6, "t": 8}
TOKENS = np.array([[3, 0, 10, 3], [1, 1, 2, 9]])
POSITIONS = np.array([[0, 1, 2, 3], [0, 1, 0, 7]])
TYPES = np.array([[0, 1, 1, 2], [2, 2, 0, 0]])
STANDS_IN = np.array([[False, True, False, False], [True, False, False, False]])
# Sums of at most 6 terms of order 1, and a norm.
FP32 = dict(rtol=5e-6, atol=5e-6)
FAST = {"xla_backend_optimization_level": 0}


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def embed_of(kind="rope", tied=True, norm_kind="rms", **config):
  """An embedding whose weights are all of order one."""
  position = PositionConfig(kind=kind, theta=100.0)
  norm = NormConfig(norm_kind, eps=1e-2, bias=norm_kind == "layer")
  make = lambda: Embed(  # noqa: E731
    jax.random.key(0), DIMS, EmbedConfig(**config), position, norm, tied
  )
  leaves, tree = jax.tree.flatten(jax.eval_shape(make))
  return jax.tree.unflatten(tree, [random(*x.shape, seed=i) for i, x in enumerate(leaves)])


def weights_of(embed):
  found = {
    name: getattr(embed, name)
    for name in ("token_vd", "position_td", "type_id", "head_dv", "head_bias_v")
    if hasattr(embed, name)
  }
  if hasattr(embed, "norm"):
    found |= {name: x for name, x in vars(embed.norm).items() if name.endswith("_d")}
  assert len(found) == len(jax.tree.leaves(embed))
  return found


def wide(inputs):
  return {name: np.asarray(x, np.float64) for name, x in inputs.items()}


def slow_embedding(w, config, kind, types, replace):
  """One token after another; `w` holds the weights, and the vectors that stand in as `other`."""
  x = np.empty((2, 4, 6))
  for place in np.ndindex(2, 4):
    vector = config.scale * w["token_vd"][TOKENS[place]]
    if replace and STANDS_IN[place]:
      vector = w["other"][place]
    if kind == "learned":
      vector = vector + w["position_td"][POSITIONS[place]]
    if kind == "sinusoidal":
      vector = vector + np.array(sinusoid(int(POSITIONS[place]), 6, 100.0))
    if config.types:
      vector = vector + w["type_id"][TYPES[place] if types else 0]
    x[place] = vector
  if config.norm and "bias_d" in w:
    return layers.layer_norm(x, w["scale_d"], w["bias_d"], 1e-2)
  return layers.rms_norm(x, w["scale_d"], 1e-2) if config.norm else x


@pytest.mark.parametrize(
  ("given", "types", "replace"),
  [
    (dict(), False, False),
    (dict(scale=2.5), False, True),
    (dict(kind="learned", types=3, norm=True, norm_kind="layer"), True, False),
    (dict(kind="learned", types=3, scale=0.5), False, True),
    (dict(kind="sinusoidal", norm=True, scale=3.0), False, False),
  ],
  ids=["bare", "scaled, replaced", "as in BERT", "type 0, replaced", "sinusoids"],
)
def test_the_embedding_and_its_gradient_equal_the_reference(given, types, replace):
  embed = embed_of(**given)
  other, grad = random(2, 4, 6, seed=30), random(2, 4, 6, seed=31)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(embed, other, grad):
    def fast(embed, other):
      stand_in = (jnp.asarray(STANDS_IN), other) if replace else None
      numbers = jnp.asarray(TYPES) if types else None
      return embed(jnp.asarray(TOKENS), jnp.asarray(POSITIONS), jnp.float32, numbers, stand_in)

    out, pull = jax.vjp(fast, embed, other)
    return out, *pull(grad)

  def slow(w):
    return slow_embedding(w, embed.config, embed.position.kind, types, replace)

  mine, grads, grad_other = run(embed, other, grad)
  inputs = weights_of(embed) | {"other": other}
  assert mine.dtype == jnp.float32
  assert_allclose(mine, slow(wide(inputs)), **FP32)
  assert_pulled(weights_of(grads) | {"other": grad_other}, slow, inputs, grad, **FP32)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "config",
  [dict(), dict(head_bias=True, logit_scale=0.5, logit_softcap=3.0)],
  ids=["bare", "scale, bias, soft cap"],
)
def test_the_head_and_its_gradient_equal_the_reference(config, tied):
  embed = embed_of(tied=tied, **config)
  x, grad = random(2, 4, 6, seed=30), random(2, 4, 11, seed=31)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(embed, x, grad):
    out, pull = jax.vjp(lambda f, x: f.logits(x), embed, x)
    return out, *pull(grad)

  def slow(w):
    head = w["token_vd"].T if tied else w["head_dv"]
    logits = (w["x"] @ head) * config.get("logit_scale", 1) + w.get("head_bias_v", 0)
    cap = config.get("logit_softcap")
    return cap * np.tanh(logits / cap) if cap else logits

  mine, grads, grad_x = run(embed, x, grad)
  inputs = weights_of(embed) | {"x": x}
  assert_allclose(mine, slow(wide(inputs)), **FP32)
  assert_pulled(weights_of(grads) | {"x": grad_x}, slow, inputs, grad, **FP32)
  if not tied:
    assert not grads.token_vd.any()


def test_the_compute_dtype_is_that_asked_for_and_logits_are_fp32():
  embed = embed_of("learned", types=2, head_bias=True, logit_scale=2.0)
  x = embed(jnp.asarray(TOKENS), jnp.asarray(POSITIONS), jnp.bfloat16)
  assert x.dtype == jnp.bfloat16
  assert embed.logits(x).dtype == jnp.float32
  exact = slow_embedding(
    wide(weights_of(embed)), EmbedConfig(types=2), "learned", False, False
  )
  # Three vectors of magnitude up to 4 are rounded to bf16, and their two sums: 2^-9 of at most 8.
  assert_allclose(np.asarray(x, np.float32), exact, rtol=0, atol=5 * 8 * 2**-9)


@pytest.mark.parametrize("piece", [3, 5, 10, 100])
def test_gradients_of_rows_are_added_up_in_fp32_piece_by_piece(monkeypatch, piece):
  monkeypatch.setattr(take, "_CHUNK", piece)
  ids = np.array([[1, 0, 1, 1, 6], [6, 1, 1, 2, 1]])
  pull = random(*ids.shape, 4).astype(jnp.bfloat16)
  rows, back = jax.vjp(lambda table: take_rows("bfloat16", table, ids), random(7, 4, seed=1))
  assert rows.dtype == jnp.bfloat16
  assert_array_equal(rows, random(7, 4, seed=1).astype(jnp.bfloat16)[ids])
  wanted = np.zeros((7, 4))
  np.add.at(wanted, ids, np.asarray(pull, np.float64))
  assert_allclose(back(pull)[0], wanted, **FP32)


def test_tokens_with_one_id_and_place_have_one_vector():
  x = embed_of()(jnp.asarray(TOKENS), jnp.asarray(POSITIONS), jnp.float32)
  assert_array_equal(x[0, 0], x[0, 3])
  assert_array_equal(x[0, 0], embed_of().token_vd[3])


def test_tables_start_with_a_spread_of_0_02_and_the_bias_with_zero():
  dims = {"v": 500, "d": 64, "t": 300}
  position = PositionConfig(kind="learned")
  config = EmbedConfig(types=40, head_bias=True)
  embed = Embed(jax.random.key(0), dims, config, position, NormConfig(), False)
  for name, std in {
    "token_vd": 0.02, "position_td": 0.02, "type_id": 0.02, "head_dv": 1 / 8
  }.items():
    weight = np.asarray(getattr(embed, name))
    # The sample deviation of N values has a relative deviation below 1/√(2N); five of them.
    assert abs(weight.std() / std - 1) < 5 / np.sqrt(2 * weight.size)
  assert not embed.head_bias_v.any()
  assert embed.position_td.shape == (300, 64) and embed.type_id.shape == (40, 64)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(types=-1), r"model\.embed\.types -1 is less than 0"),
    (dict(logit_softcap=-2.0), r"model\.embed\.logit_softcap -2\.0 is less than 0"),
    (dict(scale=0.0), r"model\.embed\.scale and logit_scale must not be 0"),
    (dict(logit_scale=0.0), r"model\.embed\.scale and logit_scale must not be 0"),
  ],
)
def test_a_wrong_config_is_one_sentence(wrong, message):
  with pytest.raises(UserError, match=f"^{message}") as caught:
    EmbedConfig(**wrong)
  assert "\n" not in str(caught.value)
