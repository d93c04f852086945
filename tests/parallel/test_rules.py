"""Proves that letters become the partition specs of the two tables, for weights and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

from docs.layout_plot import STREAM, draw_layouts, owners
from llmjax.core import tree
from llmjax.core.dims import LETTERS
from llmjax.core.dot import TENSOR_LETTERS
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.parallel import rules
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import (
  ACTIVATIONS,
  REPLICATED,
  WEIGHTS,
  axes_of,
  batch_sharding,
  check_divides,
  check_layout,
  shard,
  spec,
  weight_shardings,
)


def abstract_mesh(data, fsdp, tensor, stage=1):
  sizes = {"data": data, "fsdp": fsdp, "stage": stage, "context": 1, "expert": 1, "tensor": tensor}
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 6)


@pytest.mark.parametrize(
  ("letters", "table", "expected"),
  [
    ("df", WEIGHTS, P("fsdp", "tensor")),
    ("ldnh", WEIGHTS, P("stage", "fsdp", "tensor", None)),
    ("lnhd", WEIGHTS, P("stage", "tensor", None, "fsdp")),
    ("dkh", WEIGHTS, P("fsdp", "tensor", None)),
    ("vd", WEIGHTS, P("tensor", "fsdp")),
    ("d", WEIGHTS, P("fsdp")),
    ("dr", WEIGHTS, P("fsdp", None)),
    ("rnh", WEIGHTS, P("fsdp", "tensor", None)),
    ("", WEIGHTS, P()),
    ("btd", ACTIVATIONS, P(("data", "fsdp", "expert"), "context", None)),
    ("btnh", ACTIVATIONS, P(("data", "fsdp", "expert"), "context", "tensor", None)),
    ("btf", ACTIVATIONS, P(("data", "fsdp", "expert"), "context", "tensor")),
    ("btv", ACTIVATIONS, P(("data", "fsdp", "expert"), "context", "tensor")),
    ("bt", ACTIVATIONS, P(("data", "fsdp", "expert"), "context")),
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
  found = tree.flatten(weight_shardings(mesh, abstract(tiny_config)))
  assert found["embed/token_vd"].spec == P("tensor", "fsdp")
  assert found["decoder/norm/scale_d"].spec == P("fsdp")
  assert found["decoder/blocks/mlp_norm/scale_d"].spec == P("stage", "fsdp")
  assert found["decoder/blocks/attention/query_dnh"].spec == P("stage", "fsdp", "tensor", None)
  assert found["decoder/blocks/attention/key_dkh"].spec == P("stage", "fsdp", "tensor", None)
  assert found["decoder/blocks/attention/out_nhd"].spec == P("stage", "tensor", None, "fsdp")
  assert found["decoder/blocks/mlp/down_fd"].spec == P("stage", "tensor", "fsdp")


def test_a_weight_the_mesh_does_not_divide_is_named_with_letter_size_and_axis(tiny_config):
  # tiny_config has 2 key/value heads.
  with pytest.raises(UserError, match=r"key_dkh.* 2 key/value heads \('k'\).*tensor 3"):
    weight_shardings(abstract_mesh(1, 1, 3), abstract(tiny_config))


def test_key_heads_that_more_devices_share_are_replicated(tiny_config):
  found = tree.flatten(weight_shardings(abstract_mesh(1, 2, 4), abstract(tiny_config)))
  specs = {path.rpartition("/")[2]: sharding.spec for path, sharding in found.items()}
  assert specs["key_dkh"] == specs["value_dkh"] == P("stage", "fsdp", None, None)
  assert specs["query_dnh"] == P("stage", "fsdp", "tensor", None)


def test_layers_that_stages_do_not_divide_are_cut_along_the_width(tiny_config):
  layers = tiny_config.layers
  found = weight_shardings(abstract_mesh(1, 2, 1, stage=2 * layers), abstract(tiny_config))
  specs = {path: sharding.spec for path, sharding in tree.flatten(found).items()}
  assert specs["decoder/blocks/mlp/up_df"] == P(None, ("fsdp", "stage"), "tensor")
  assert specs["embed/token_vd"] == P("tensor", "fsdp")


def test_without_zero_3_weights_are_whole_on_fsdp(tiny_config):
  mesh = abstract_mesh(1, 4, 2)
  weights = tree.flatten(weight_shardings(mesh, abstract(tiny_config), REPLICATED))
  assert weights["decoder/blocks/mlp/up_df"].spec == P("stage", None, "tensor")


def test_a_large_weight_that_nothing_cuts_is_named(monkeypatch, tiny_config):
  shapes = abstract(tiny_config)
  check_layout(abstract_mesh(1, 2, 2), shapes, WEIGHTS)
  monkeypatch.setattr(rules, "REPLICATED_BYTES", 100)
  check_layout(abstract_mesh(8, 1, 1), shapes, WEIGHTS)  # whole copies are what data means
  with pytest.raises(UserError, match=r"scale_d' \(ld\) of 0 MB would be replicated.*over tensor"):
    check_layout(abstract_mesh(1, 1, 2), shapes, WEIGHTS)


def test_a_mesh_axis_that_cuts_no_activation_is_named(monkeypatch, tiny_config):
  monkeypatch.setitem(ACTIVATIONS, "b", ("fsdp", "expert"))
  with pytest.raises(UserError, match=r"axis data 8 shards neither rows \(b\) nor positions \(t\)"):
    check_layout(abstract_mesh(8, 1, 1), abstract(tiny_config), WEIGHTS)


@pytest.mark.parametrize("letters", ["bt", "df"])
@pytest.mark.parametrize(
  "sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2}]
)
def test_the_picture_of_layouts_is_what_jax_does(letters, sizes):
  table = STREAM if letters == "bt" else WEIGHTS
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  axes = [tuple(a for a in axes_of(letter, table) if a in sizes) or None for letter in letters]
  held = owners(letters, table, sizes)
  shard = NamedSharding(mesh, P(*axes)).shard_shape((4, 4))
  assert (held.sum((0, 1)) == shard[0] * shard[1]).all() and held.any(2).all()


def test_the_picture_of_layouts_is_drawn(tmp_path):
  draw_layouts(tmp_path / "layouts.png")
  assert (tmp_path / "layouts.png").stat().st_size > 5000


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
  assert constraint.params["sharding"].spec == P(("data", "fsdp", "expert"), "context", "tensor")
  assert_array_equal(y, x)


def test_batches_are_cut_along_rows():
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  assert batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp", "expert")))
  placed = jax.device_put(np.zeros((2, 3)), batch_sharding(mesh))
  assert placed.shape == (2, 3)


def test_the_scales_of_a_weight_of_one_block_are_replicated():
  """A width of one is not sharded; other sizes that the mesh does not divide are refused."""
  mesh = abstract_mesh(1, 2, 2)
  made = weight_shardings(mesh, {"scale_df": jnp.zeros((1, 6)), "codes_df": jnp.zeros((8, 6))})
  assert made["scale_df"].spec == P(None, "tensor")
  assert made["codes_df"].spec == P("fsdp", "tensor")
  with pytest.raises(UserError, match="'scale_df' has 3 residual width"):
    weight_shardings(mesh, {"scale_df": jnp.zeros((3, 6))})


def test_a_row_has_one_scale_over_all_letters_that_tensor_shards():
  """`core.dot` cannot import the tables, and names the letters for int8 products itself."""
  assert {a for a in ACTIVATIONS if "tensor" in axes_of(a, ACTIVATIONS)} == TENSOR_LETTERS
