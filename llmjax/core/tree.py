"""Tree paths, by which parameters are named everywhere: the keys that lead to a leaf, joined by
`/`, as in `model/blocks/mlp/up_df`."""

import fnmatch
from collections.abc import Callable, Iterator

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


def first_matches(section: str, rows, paths, nouns: str) -> Iterator[tuple]:
  """Yields (pattern, value, paths that no earlier pattern matches) of rows (pattern, value).

  Raises:
    UserError: there are none; `section` and `nouns` tell what was matched with what.
  """
  left = set(paths)
  for pattern, value in rows:
    matching = fnmatch.filter(paths, pattern)
    taken = [path for path in matching if path in left]
    if not taken:
      what = f"no {nouns}; {nearest(pattern, paths)}"
      if matching:
        what = f"only {nouns} that earlier rows match, such as {matching[0]!r}"
      raise UserError(f"{section}: pattern {pattern!r} matches {what}")
    left -= set(taken)
    yield pattern, value, taken
