"""Proves that weights start with the promised spread, from a key of their own name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from llmjax.core import tree
from llmjax.models.build import abstract
from llmjax.models.depth import unstack_layers
from llmjax.nn.param import ROLES, constant, fan_in, normal, param, roles
from tests.models.variants import VARIANTS

DIMS = {"d": 64, "n": 8, "h": 16, "f": 300}
KEY = jax.random.key(0)


def weight_of(name, init):
  """Declares a weight as a module does."""

  class Holder(nnx.Module):
    def __init__(self):
      param(self, KEY, name, DIMS, init)

  return getattr(Holder(), name)


@pytest.mark.parametrize(
  ("name", "init", "shape", "std"),
  [
    ("up_df", fan_in(DIMS, "d"), (64, 300), 64**-0.5),
    ("query_dnh", fan_in(DIMS, "d"), (64, 8, 16), 64**-0.5),
    ("out_nhd", fan_in(DIMS, "nh", 0.5), (8, 16, 64), 0.5 * 128**-0.5),
    ("token_fd", normal(0.02), (300, 64), 0.02),
  ],
)
def test_shape_spread_and_cut_are_as_declared(name, init, shape, std):
  weight = weight_of(name, init)
  assert weight.shape == shape and weight.dtype == jnp.float32
  # The sample deviation of N values has itself a relative deviation below 1/√(2N); five of them.
  assert abs(np.std(weight) / std - 1) < 5 / np.sqrt(2 * weight.size)
  assert abs(np.mean(weight)) < 5 * std / np.sqrt(weight.size)
  assert np.abs(weight).max() <= 2 * std / 0.8796 * (1 + 1e-4)  # cut at two, then rescaled


def test_weights_of_other_names_are_other_draws_and_of_the_same_name_the_same():
  up, gate = (weight_of(name, normal(1.0)) for name in ("up_df", "gate_df"))
  assert abs(np.corrcoef(up.ravel(), gate.ravel())[0, 1]) < 5 / np.sqrt(up.size)
  assert_array_equal(up, weight_of("up_df", normal(1.0)))


def test_a_constant_is_the_same_everywhere():
  assert_array_equal(weight_of("scale_d", constant(1.0)), np.ones(64, np.float32))


def test_a_name_with_a_letter_nobody_sized_is_an_error():
  with pytest.raises(KeyError, match="q"):
    param(nnx.Module(), KEY, "up_dq", DIMS, normal(1.0))


def test_every_weight_of_every_model_has_a_role():
  seen = set()
  for config in VARIANTS.values():
    model = abstract(config)
    assert roles(model).keys() == tree.flatten(model).keys()
    seen |= set(roles(model).values())
  assert seen == set(ROLES)


def test_roles_are_what_a_reader_of_the_papers_would_say():
  found = roles(abstract(VARIANTS["deepseek"])) | roles(abstract(VARIANTS["gptoss"]))
  expected = {
    "embed/token_vd": "table", "decoder/norm/scale_d": "scale",
    "decoder/first/mlp/up_df": "matrix", "decoder/blocks/moe/shared/down_fd": "matrix",
    "decoder/blocks/moe/router_de": "matrix", "decoder/blocks/moe/bias_e": "router_bias",
    "decoder/blocks/attention/query_bias_nh": "bias", "decoder/blocks/attention/sinks_n": "bias",
  }
  assert {path: found[path] for path in expected} == expected
  layers = roles(jax.eval_shape(unstack_layers, abstract(VARIANTS["gptoss"])))
  assert layers["decoder/blocks/2/attention/sinks_n"] == "bias"


def test_a_role_that_nobody_knows_is_an_error():
  with pytest.raises(ValueError, match="'vector' of 'up_df'"):
    param(nnx.Module(), KEY, "up_df", DIMS, normal(1.0), "vector")
