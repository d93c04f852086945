"""Proves that depth and dropout are run alike however: scanned, unrolled, with every remat."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.models.build import abstract, build
from llmjax.models.config import REMAT
from llmjax.models.model import Model
from tests.models.variants import VARIANTS, batch_of, inputs, make_config, weights_of

# Three layers in cycles of two, so that one is left over; dropping, so that masks must agree too.
CONFIG = make_config(**{
  "layers": 3, "attention.pattern": ("window", "full"), "attention.window": 4, "dropout": 0.3,
})
CROSSED = make_config(**{
  "kind": "encoder_decoder", "layers": 3, "encoder_layers": 1, "dropout": 0.3,
  "attention.pattern": ("window", "full"), "attention.window": 4, "position.kind": "relative",
})
# Experts from the second layer on, of which dropping and noise are drawn as well.
ROUTED = make_config(**{
  "layers": 4, "attention.pattern": ("window", "full"), "attention.window": 4, "dropout": 0.3,
  "moe.experts": 4, "moe.width": 16, "moe.first_k_dense": 1, "moe.capacity": 1.0, "moe.noisy": True,
})
KEY = jax.random.key(7, impl="rbg")  # the default compiles slowly
pytestmark = pytest.mark.usefixtures("quick_compile")


@jax.jit
def loss_and_grad(model, batch, key):
  def loss(model):
    return jnp.sum(jnp.sin(model.logits(model.hidden(batch, key=key)[0])))

  return jax.value_and_grad(loss)(model)


def of(config, **changes):
  """(the same weights in a model of another config, its inputs)."""
  config = dataclasses.replace(config, **changes)
  return weights_of(config), batch_of(inputs(config))


@pytest.fixture(scope="module")
def plain():
  return loss_and_grad(*of(CONFIG), KEY)


@pytest.mark.parametrize(
  ("scan", "remat"),
  [
    *((True, remat) for remat in (*REMAT, "query+gate") if remat != "none"),
    *((False, remat) for remat in ("none", "full")),
    *(
      pytest.param(False, remat, marks=pytest.mark.slow)
      for remat in (*REMAT, "query+gate") if remat not in ("none", "full")
    ),
  ],
)
def test_loss_and_gradients_are_those_of_scan_without_remat(plain, scan, remat):
  assert_same(loss_and_grad(*of(CONFIG, scan=scan, remat=remat), KEY), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "save_projections")])
def test_two_stacks_are_run_alike(scan, remat):
  plain = loss_and_grad(*of(CROSSED), KEY)
  assert_same(loss_and_grad(*of(CROSSED, scan=scan, remat=remat), KEY), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("scan", "remat"), [(False, "save_projections"), (False, "none"), (True, "full")]
)
def test_experts_are_run_alike(scan, remat):
  found, plain = (
    _routed_loss_and_grad(*of(ROUTED, **how), KEY) for how in ({}, {"scan": scan, "remat": remat})
  )
  (loss, routing), (expected, routing_before) = found[0], plain[0]
  assert_same((loss, found[1]), (expected, plain[1]))
  assert routing.load_e.shape == (3, 4)
  assert len(np.unique(np.asarray(routing.load_e), axis=0)) == 3  # layers differ, so order shows
  for one, other in zip(jax.tree.leaves(routing), jax.tree.leaves(routing_before), strict=True):
    assert_allclose(one, other, rtol=1e-5)


@jax.jit
def _routed_loss_and_grad(model, batch, key):
  def loss(model):
    x_btd, _, routing = model.hidden(batch, key=key)
    routers = jnp.sum(jnp.arange(1.0, 4) * (routing.balance + routing.sequence + routing.z))
    return jnp.sum(jnp.sin(model.logits(x_btd))) + routers, routing

  return jax.value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_a_pattern_need_not_divide_the_layers(layers):
  pattern = dataclasses.replace(CONFIG.attention, pattern=("window", "full", "full"))
  config = dataclasses.replace(CONFIG, layers=layers, attention=pattern)
  model, batch = of(config)
  scanned, unrolled = (_hidden(build_like(model, scan), batch) for scan in (True, False))
  assert_allclose(scanned, unrolled, rtol=0, atol=2e-6 * np.abs(scanned).max())


def build_like(model, scan):
  config = dataclasses.replace(model.config, scan=scan)
  return tree.unflatten(abstract(config), tree.flatten(model))


@jax.jit
def _hidden(model, batch):
  return model.hidden(batch)[0]


def assert_same(found, expected):
  # The same arithmetic, fused in other ways: a sum over 24 · 40 sines, each rounded to 2^-24.
  assert_allclose(found[0], expected[0], rtol=0, atol=2e-4)
  for path, grad in tree.flatten(expected[1]).items():
    other = tree.flatten(found[1])[path]
    # Some 2^6 roundings of 2^-24 of the leaf's largest.
    assert_allclose(other, grad, rtol=0, atol=1e-5 * np.abs(grad).max() + 1e-6, err_msg=path)


def test_remat_recomputes_what_it_says():
  def dots(remat):
    model, batch = of(VARIANTS["llama"], remat=remat, scan=False)
    loss = lambda model: jnp.sum(model.logits(model.hidden(batch)[0]))  # noqa: E731
    return count(jax.make_jaxpr(jax.grad(loss))(model).jaxpr, "dot_general")

  # A layer has 7 products with weights and 2 within attention, the head is one more; each is done
  # once forward and twice backward. "dots" keeps the former and repeats the latter; what is saved
  # by name leaves the scores and the output projection; "full" repeats all but the last of each
  # layer, whose result the backward pass never reads.
  layers = VARIANTS["llama"].layers
  none = 3 * (9 * layers + 1)
  assert dots("none") == none
  assert dots("dots") == none + 2 * layers
  assert dots("save_projections") == none + 2 * layers
  assert dots("offload") == none + 2 * layers
  assert dots("full") == none + 8 * layers
  assert dots("query+key+value") == none + 5 * layers


def test_offload_keeps_what_it_saves_in_host_memory():
  def moved(remat):
    model, batch = of(VARIANTS["llama"], remat=remat, scan=False)
    loss = lambda model: jnp.sum(model.logits(model.hidden(batch)[0]))  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(model)).count("<host>")

  assert moved("save_projections") == 0
  assert moved("offload") >= 6 * VARIANTS["llama"].layers  # query, key, value, attention, gate, up


def count(jaxpr, name):
  """Counts the equations of a primitive in a jaxpr and in all within it."""
  inner = sum(count(sub, name) for sub in jax.extend.core.subjaxprs(jaxpr))
  return inner + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


@pytest.mark.parametrize("config", [CONFIG, CROSSED], ids=["decoder", "encoder_decoder"])
def test_dropout_is_a_function_of_the_key(config):
  run = jax.jit(lambda model, batch, key: model.hidden(batch, key=key)[0])
  model, batch = of(config)
  first, again, other = (run(model, batch, jax.random.key(seed)) for seed in (1, 1, 2))
  assert_array_equal(first, again)
  assert (np.abs(first - other) > 1e-3).mean() > 0.9
  still = of(config, dropout=0.0)[0]
  assert_array_equal(run(model, batch, None), run(still, batch, None))
  # With nothing to drop, a key changes nothing but the graph.
  assert_allclose(run(still, batch, KEY), run(still, batch, None), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_every_place_drops_its_share_by_itself(scan):
  """Sublayers that only add one: what is left of 1 + 4 of them counts the places that kept it."""
  config = make_config(**{
    "dropout": 0.3, "scan": scan, "norm.final": False, "mlp_bias": True, "attention.bias": "all",
  })

  def one(path, leaf):
    return jnp.full(leaf.shape, float("token_vd" in path or path.endswith("_bias_d")), jnp.float32)

  model = tree.map_with_path(one, abstract(config))
  tokens = jnp.zeros((64, 12), jnp.int32)
  left = model.hidden(batch_of({"tokens": tokens}), key=KEY)[0]
  kept = np.rint(np.asarray(left) * 0.7)
  assert_allclose(left, kept / 0.7, rtol=1e-6)
  shares = np.bincount(kept.astype(int).ravel(), minlength=6) / kept.size
  expected = [math.comb(5, i) * 0.7**i * 0.3 ** (5 - i) for i in range(6)]
  # 24,576 draws a bin: a standard deviation is at most √(0.25 / 24576) = 0.0032; five of them.
  assert_allclose(shares, expected, rtol=0, atol=0.016)
  assert abs(np.mean(left) / 5 - 1) < 0.01  # the expectation is what was put in


def test_weights_are_a_function_of_the_key_alone():
  config = VARIANTS["llama"]
  make = jax.jit(lambda key: build(key, config))
  first, again, other = (
    {path: np.asarray(leaf) for path, leaf in tree.flatten(make(jax.random.key(seed))).items()}
    for seed in (0, 0, 1)
  )
  for path, leaf in first.items():
    assert_array_equal(leaf, again[path])
    if "scale" not in path:
      assert (leaf != other[path]).mean() > 0.99, path
      if path.startswith("decoder/blocks/"):
        assert (leaf[0] != leaf[1]).mean() > 0.99, path  # layers differ


def test_decoding_on_a_cpu_reads_the_same_memory():
  config = make_config(layers=3)
  model = Model(config, jax.jit(lambda: build(KEY, config))())
  stacked = model.parameters.decoder.blocks.mlp.up_df
  for number, block in enumerate(model.decoding.decoder.blocks):
    leaf = block.mlp.up_df
    assert leaf.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + number * leaf.nbytes
    assert_array_equal(leaf, stacked[number])
