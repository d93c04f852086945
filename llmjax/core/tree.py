"""Tree paths and path patterns: how parameters are named and selected, everywhere.

A path is the parts of a leaf's place joined by `/`: `model/blocks/mlp/up_df`. A pattern is a shell
glob in which `*` also crosses `/`. Selecting with a pattern that matches nothing is an error.
"""

import fnmatch
from collections.abc import Callable, Sequence

import jax

from llmjax.core.errors import UserError, nearest


def path_of(keys) -> str:
  """Joins a jax key path into `a/b/c`."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree, is_leaf: Callable | None = None) -> dict[str, jax.Array]:
  """Lists a tree's leaves by path, in tree order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {path_of(keys): leaf for keys, leaf in leaves}


def unflatten(like, leaves: dict[str, jax.Array]):
  """Builds a tree shaped as `like` from leaves by path.

  Raises:
    KeyError: a path of `like` is missing from `leaves`.
  """
  return map_with_path(lambda path, _: leaves[path], like)


def map_with_path(function: Callable, tree, *rest, is_leaf: Callable | None = None):
  """Maps `function(path, leaf, *others)` over a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest, is_leaf=is_leaf
  )


def select(tree, patterns: Sequence[str]):
  """Marks the leaves whose path matches any pattern.

  Args:
    tree: any pytree.
    patterns: shell globs over whole paths, `*` crossing `/`.
  Returns:
    The tree with a Python bool at every leaf.
  Raises:
    UserError: a pattern matches no path.
  """
  paths = list(flatten(tree))
  for pattern in patterns:
    if not fnmatch.filter(paths, pattern):
      raise UserError(f"pattern {pattern!r} matches no parameter; {nearest(pattern, paths)}")
  return map_with_path(
    lambda path, _: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns), tree
  )
