"""Proves that leaves are named by their path, and that a pattern selecting nothing is an error."""

import jax
import jax.numpy as jnp
import pytest

from llmjax.core import tree
from llmjax.core.errors import UserError

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


@pytest.mark.parametrize(
  ("patterns", "chosen"),
  [
    (["*/scale_d"], {"model/norm/scale_d"}),
    (["model/*"], {"model/mlp/down_fd", "model/mlp/up_df", "model/norm/scale_d"}),
    (["list/0", "*up_df"], {"list/0", "model/mlp/up_df"}),
    ([], set()),
  ],
)
def test_select_marks_what_any_pattern_matches(patterns, chosen):
  marks = tree.flatten(tree.select(NESTED, patterns))
  assert {path for path, marked in marks.items() if marked} == chosen
  assert set(marks.values()) <= {True, False}


def test_a_pattern_that_matches_nothing_is_an_error_that_names_it_and_its_neighbour():
  with pytest.raises(UserError, match=r"'model/norm/scale_e'.*'model/norm/scale_d'"):
    tree.select(NESTED, ["*/scale_d", "model/norm/scale_e"])


def test_patterns_tell_upper_case_from_lower():
  with pytest.raises(UserError):
    tree.select({"Scale_d": jnp.ones(1)}, ["scale_d"])
