"""Proves that the decoder equals the reference, and itself however it is run: scan, remat, packed,
cached.
"""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.models.config import ModelConfig, forward_flops_per_token
from llmjax.models.decoder import Decoder, abstract, count_parameters
from tests.reference.decoder import decoder as reference_decoder
from tests.reference.gradient import derivative
from tests.reference.losses import cross_entropy

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [3] + [0], [1] * 12])
POSITIONS = np.array([[*range(5), *range(5), 0, 0], [*range(12)]])
TARGETS = np.random.default_rng(1).integers(0, 96, (2, 12))
WEIGHT = (np.random.default_rng(2).random((2, 12)) < 0.7).astype(np.float32)

# Two layers of sums of at most 64 terms with activations of order 1 to 4, logits of order 1: some
# 2^5 roundings of 2^-24 on top of one another.
FP32 = dict(rtol=1e-5, atol=1e-5)


@jax.jit
def run(decoder, tokens, segments, positions):
  return decoder(tokens, segments, positions)[0]


@jax.jit
def loss_and_grad(decoder, tokens, segments, positions):
  def loss(decoder):
    log_p = jax.nn.log_softmax(decoder(tokens, segments, positions)[0])
    return -jnp.sum(jnp.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0] * WEIGHT)

  return jax.value_and_grad(loss)(decoder)


def lively(decoder):
  """Weights away from their start: scales that are not one, logits of order one."""

  def change(path, leaf):
    rng = np.random.default_rng(len(path))
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return leaf + noise * (0.2 if "scale" in path else 0.15 if "embed" in path else 0.05)

  return tree.map_with_path(change, decoder)


def with_config(decoder, config):
  """The same weights in a decoder of another config."""
  return tree.unflatten(abstract(config), tree.flatten(decoder))


@pytest.fixture(scope="module")
def decoder(tiny_decoder):
  return lively(tiny_decoder)


@pytest.fixture(scope="module")
def untied(tiny_config):
  config = dataclasses.replace(tiny_config, tie_embeddings=False, layers=1, head_dim=6)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32), abstract(config)
  )


@pytest.fixture(scope="module")
def gradients(decoder):
  return loss_and_grad(decoder, TOKENS, SEGMENTS, POSITIONS)


@pytest.mark.parametrize("which", ["decoder", "untied"])
def test_logits_and_gradients_equal_the_reference(which, request):
  model = request.getfixturevalue(which)
  weights = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model).items()}
  assert ("embed/head_dv" in weights) == (which == "untied")

  def slow(weights):
    config = model.config
    return reference_decoder(
      weights, TOKENS, SEGMENTS, POSITIONS, theta=config.rope_theta, eps=config.norm_eps
    )

  logits = run(model, TOKENS, SEGMENTS, POSITIONS)
  assert logits.dtype == jnp.float32
  assert_allclose(logits, slow(weights), **FP32)

  loss, grads = loss_and_grad(model, TOKENS, SEGMENTS, POSITIONS)
  assert_allclose(loss, cross_entropy(slow(weights), TARGETS, WEIGHT)[0], **FP32)
  rng = np.random.default_rng(0)
  for path, grad in tree.flatten(grads).items():
    direction = rng.normal(size=grad.shape)
    direction /= np.linalg.norm(direction)

    def along(w, path=path):
      return cross_entropy(slow({**weights, path: w}), TARGETS, WEIGHT)[0]

    theirs = derivative(along, weights[path], direction)
    # A unit direction through a gradient whose norm is of order 10: its rounding, not the
    # derivative's own size, decides.
    scale = float(jnp.linalg.norm(grad))
    assert scale > 1e-3, path
    found = np.sum(np.asarray(grad, np.float64) * direction)
    assert_allclose(found, theirs, rtol=0, atol=1e-5 * scale + 1e-6, err_msg=path)


@pytest.mark.parametrize(
  ("scan", "remat"),
  [(False, "none"), (True, "full"), (True, "dots"), (False, "full"), (False, "dots")],
)
def test_loss_and_gradients_are_those_of_scan_without_remat(decoder, gradients, scan, remat):
  config = dataclasses.replace(decoder.config, scan=scan, remat=remat)
  loss, grads = loss_and_grad(with_config(decoder, config), TOKENS, SEGMENTS, POSITIONS)
  # The same arithmetic, fused in other ways: a sum over 24 positions of losses near 5.
  assert_allclose(loss, gradients[0], rtol=2e-6)
  for path, grad in tree.flatten(gradients[1]).items():
    other = tree.flatten(grads)[path]
    assert_allclose(other, grad, rtol=1e-5, atol=1e-5 * np.abs(grad).max(), err_msg=path)


def test_remat_recomputes_what_it_says(decoder):
  def dots(remat):
    config = dataclasses.replace(decoder.config, remat=remat, scan=False)
    model = with_config(decoder, config)
    jaxpr = jax.make_jaxpr(jax.grad(lambda model: jnp.sum(model(TOKENS)[0])))(model)
    return count_dots(jaxpr.jaxpr)

  # A layer has 7 products with weights and 2 within attention, the head is one more; each is done
  # once forward and twice backward. "dots" keeps the former and repeats the latter; "full" repeats
  # all but the last of each layer, whose result the backward pass never reads.
  layers = decoder.config.layers
  none = 3 * (9 * layers + 1)
  assert dots("none") == none
  assert none < dots("dots") <= none + 2 * layers
  assert dots("dots") < dots("full") <= none + 9 * layers


def count_dots(jaxpr):
  """Counts the matrix products of a jaxpr and of all within it."""
  inner = sum(count_dots(sub) for sub in jax.extend.core.subjaxprs(jaxpr))
  return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def test_a_packed_row_equals_its_documents_alone(decoder):
  logits = run(decoder, TOKENS, SEGMENTS, POSITIONS)
  documents = TOKENS[0, :10].reshape(2, 5)
  alone = run(decoder, documents, np.ones((2, 5), int), np.arange(5)[None] + np.zeros((2, 1), int))
  assert_allclose(logits[0, :10].reshape(alone.shape), alone, **FP32)


def test_a_documents_logits_do_not_depend_on_its_neighbours_bit_for_bit(decoder):
  other = TOKENS.copy()
  other[0, SEGMENTS[0] != 2] = 7
  before, after = (run(decoder, tokens, SEGMENTS, POSITIONS)[0] for tokens in (TOKENS, other))
  assert_array_equal(before[SEGMENTS[0] == 2], after[SEGMENTS[0] == 2])


def test_changing_a_token_changes_no_logits_before_it_and_all_after(decoder):
  row = TOKENS[1:]
  positions, segments = np.arange(12)[None], np.ones((1, 12), int)
  before = np.asarray(run(decoder, row, segments, positions))
  for place in range(12):
    changed = row.copy()
    changed[0, place] = (changed[0, place] + 1) % 96
    after = np.asarray(run(decoder, changed, segments, positions))
    assert_array_equal(after[0, :place], before[0, :place])
    assert (np.abs(after - before)[0, place:].max(-1) > 1e-4).all()


def test_positions_and_segments_default_to_one_document(decoder):
  ones = np.ones_like(TOKENS)
  places = np.broadcast_to(np.arange(12), TOKENS.shape)
  # The same graph compiled by itself: equal to rounding.
  assert_allclose(decoder(TOKENS)[0], run(decoder, TOKENS, ones, places), **FP32)


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_with_the_cache_equals_the_full_forward_pass(decoder, scan):
  model = with_config(decoder, dataclasses.replace(decoder.config, scan=scan))
  full = decoder(TOKENS)[0]

  @jax.jit
  def step(model, tokens, positions, cache):
    return model(tokens, positions_bt=positions, cache=cache)

  def places(start, stop):
    return jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))

  logits, cache = step(model, TOKENS[:, :5], places(0, 5), model.empty_cache(2, 16))
  assert_allclose(logits, full[:, :5], **FP32)
  for place in range(5, 12):
    positions = places(place, place + 1)
    logits, cache = step(model, TOKENS[:, place : place + 1], positions, cache)
    assert_allclose(logits[:, 0], full[:, place], **FP32)
  assert not cache.key_bskh[:, :, 12:].any()
  assert cache.key_bskh.shape == (2, 2, 16, 2, 8)


def test_bf16_logits_are_fp32_and_near_those_of_fp32(decoder):
  config = dataclasses.replace(decoder.config, dtype="bfloat16")
  logits = run(with_config(decoder, config), TOKENS, SEGMENTS, POSITIONS)
  exact = np.asarray(run(decoder, TOKENS, SEGMENTS, POSITIONS))
  assert logits.dtype == jnp.float32
  # Every activation is rounded by up to 2^-9 on average-ish; a dozen in a row add as √12 to about
  # 1 % of the logits' spread.
  error = np.sqrt(np.mean((np.asarray(logits) - exact) ** 2)) / exact.std()
  assert 1e-4 < error < 0.02


def test_weights_are_a_function_of_the_key_alone(tiny_config, tiny_decoder):
  make = jax.jit(lambda key: Decoder(key, tiny_config))
  again, other = (
    {path: np.asarray(leaf) for path, leaf in tree.flatten(make(jax.random.key(seed))).items()}
    for seed in (0, 1)
  )
  for path, leaf in tree.flatten(tiny_decoder).items():
    leaf = np.asarray(leaf)
    assert_array_equal(leaf, again[path])
    if "scale" not in path:
      assert (leaf != other[path]).mean() > 0.99, path
      if path.startswith("blocks/"):
        assert (leaf[0] != leaf[1]).mean() > 0.99, path  # layers differ


CONFIGS = [
  ModelConfig(2, 32, 4, 2, 0, 64, 96, tie_embeddings=True),
  ModelConfig(3, 32, 4, 4, 10, 48, 50, tie_embeddings=False),
  ModelConfig(80, 8192, 64, 8, 128, 28_672, 128_256, tie_embeddings=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied", "70B"])
def test_parameters_are_counted_as_by_hand(config):
  d, h = config.width, config.head_dim or config.width // config.heads
  attention = d * config.heads * h * 2 + d * config.kv_heads * h * 2
  layer = attention + 3 * d * config.mlp_width + 2 * d
  heads = 1 if config.tie_embeddings else 2
  by_hand = config.layers * layer + d + heads * config.vocab_size * d
  assert count_parameters(config) == by_hand
  if config.layers == 80:
    assert by_hand == 70_553_706_496  # Llama 3 70B, as published


def test_parameters_are_counted_as_the_tree_has_them(tiny_config, tiny_decoder):
  assert count_parameters(tiny_config) == sum(leaf.size for leaf in jax.tree.leaves(tiny_decoder))


@pytest.mark.parametrize("tied", [True, False])
def test_forward_flops_are_those_xla_counts_but_for_the_masked_half(tied):
  length, batch = 128, 2
  config = ModelConfig(
    layers=3, width=128, heads=4, kv_heads=2, head_dim=64, mlp_width=320, vocab_size=512,
    context=length, dtype="float32", scan=False, tie_embeddings=tied,
  )
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  lowered = jax.jit(lambda model, tokens: model(tokens)[0]).lower(abstract(config), tokens)
  counted = lowered.compile().cost_analysis()["flops"] / (batch * length)
  causal = forward_flops_per_token(config, length)
  # XLA multiplies every query with every key: `length` of them, where causal rows need
  # (length + 1) / 2 on average.
  per_key = 2 * 2 * config.heads * 64 * config.layers
  full = causal + per_key * (length - (length + 1) / 2)
  # XLA also counts softmax, norms, rotations and gates, one or a few per element: some 5 per
  # score beside the 4 · 64 of its products, 2 %, and nothing else of that size.
  assert full <= counted <= 1.03 * full
