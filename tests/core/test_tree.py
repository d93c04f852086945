"""Proves that leaves are named by their path, and that a pattern selecting nothing is an error."""

import jax
import pytest

from llmjax.core import tree

NESTED = {"model": {"mlp": {"up_df": 1, "down_fd": 2}, "norm": {"scale_d": 3}}, "list": [4, 5]}


def test_paths_join_the_parts_of_a_place():
  assert tree.flatten(NESTED) == {
    "list/0": 4,
    "list/1": 5,
    "model/mlp/down_fd": 2,
    "model/mlp/up_df": 1,
    "model/norm/scale_d": 3,
  }


def test_a_models_paths_carry_module_and_attribute_names(tiny_decoder):
  paths = tree.flatten(tiny_decoder)
  assert "embed/token_vd" in paths
  assert "decoder/blocks/attention/query_dnh" in paths
  assert len(paths) == len(jax.tree.leaves(tiny_decoder))


def test_unflatten_undoes_flatten():
  assert tree.unflatten(NESTED, tree.flatten(NESTED)) == NESTED


def test_unflatten_refuses_missing_leaves():
  leaves = tree.flatten(NESTED)
  del leaves["list/1"]
  with pytest.raises(KeyError, match="list/1"):
    tree.unflatten(NESTED, leaves)


def test_map_with_path_sees_every_path_and_the_other_trees_leaf():
  doubled = jax.tree.map(lambda leaf: 2 * leaf, NESTED)
  made = tree.map_with_path(lambda path, a, b: (path, a, b), NESTED, doubled)
  assert made["model"]["norm"]["scale_d"] == ("model/norm/scale_d", 3, 6)
