"""Proves that letters become the partition specs of the two tables, for weights and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from llmjax.core import tree
from llmjax.core.dims import LETTERS
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import (
  ACTIVATIONS,
  WEIGHTS,
  batch_sharding,
  check_divides,
  shard,
  spec,
  state_shardings,
)


def abstract_mesh(data, fsdp, tensor):
  return AbstractMesh(
    (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )


@pytest.mark.parametrize(
  ("letters", "table", "expected"),
  [
    ("df", WEIGHTS, P("fsdp", "tensor")),
    ("ldnh", WEIGHTS, P(None, "fsdp", "tensor", None)),
    ("lnhd", WEIGHTS, P(None, "tensor", None, "fsdp")),
    ("dkh", WEIGHTS, P("fsdp", "tensor", None)),
    ("vd", WEIGHTS, P("tensor", "fsdp")),
    ("d", WEIGHTS, P("fsdp")),
    ("", WEIGHTS, P()),
    ("btd", ACTIVATIONS, P(("data", "fsdp"), None, None)),
    ("btnh", ACTIVATIONS, P(("data", "fsdp"), None, "tensor", None)),
    ("btf", ACTIVATIONS, P(("data", "fsdp"), None, "tensor")),
    ("btv", ACTIVATIONS, P(("data", "fsdp"), None, "tensor")),
    ("bt", ACTIVATIONS, P(("data", "fsdp"), None)),
  ],
)
def test_letters_are_looked_up_one_by_one(letters, table, expected):
  assert spec(letters, table) == expected


def test_both_tables_speak_of_known_letters_and_axes_only():
  axes = set(make_mesh(MeshConfig()).axis_names)
  for table in (WEIGHTS, ACTIVATIONS):
    assert table.keys() <= LETTERS.keys()
    for value in table.values():
      assert set([value] if isinstance(value, str) else value) <= axes


def test_every_weight_of_a_model_gets_the_sharding_of_its_letters(tiny_config):
  mesh = abstract_mesh(2, 4, 2)
  found = tree.flatten(state_shardings(mesh, abstract(tiny_config)))
  assert found["embed/token_vd"].spec == P("tensor", "fsdp")
  assert found["decoder/norm/scale_d"].spec == P("fsdp")
  assert found["decoder/blocks/mlp_norm/scale_d"].spec == P(None, "fsdp")
  assert found["decoder/blocks/attention/query_dnh"].spec == P(None, "fsdp", "tensor", None)
  assert found["decoder/blocks/attention/key_dkh"].spec == P(None, "fsdp", "tensor", None)
  assert found["decoder/blocks/attention/out_nhd"].spec == P(None, "tensor", None, "fsdp")
  assert found["decoder/blocks/mlp/down_fd"].spec == P(None, "tensor", "fsdp")


def test_a_weight_the_mesh_does_not_divide_is_named_with_letter_size_and_axis(tiny_config):
  # tiny_config has 2 key/value heads.
  with pytest.raises(UserError, match=r"key_dkh.* 2 key/value heads \('k'\).*tensor 4"):
    state_shardings(abstract_mesh(1, 1, 4), abstract(tiny_config))


def test_check_divides_multiplies_the_axes_of_a_letter():
  mesh = abstract_mesh(2, 3, 1)
  check_divides(mesh, "batch", "bt", (12, 5), ACTIVATIONS)
  with pytest.raises(UserError, match=r"'batch' has 8 batch \('b'\).*data 2 × fsdp 3"):
    check_divides(mesh, "batch", "bt", (8, 5), ACTIVATIONS)


def test_shard_without_a_mesh_returns_its_argument():
  x = jnp.ones((2, 3, 4))
  assert shard(x, "btd") is x


def test_shard_under_a_mesh_constrains_to_the_letters_and_keeps_values():
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  x = jnp.arange(24.0).reshape(2, 3, 4)
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda x: shard(x, "btf"))(x)
    y = jax.jit(lambda x: shard(x, "btf"))(x)
  constraint = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint")
  assert constraint.params["sharding"].spec == P(("data", "fsdp"), None, "tensor")
  assert_array_equal(y, x)


def test_batches_are_cut_along_rows():
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  assert batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp"), None))
  placed = jax.device_put(np.zeros((2, 3)), batch_sharding(mesh))
  assert placed.shape == (2, 3)
