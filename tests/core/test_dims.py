"""Proves that an array's letters are read off its name, and that a misnamed array is an error."""

import pytest

from llmjax.core.dims import LETTERS, letters_of
from llmjax.core.errors import UserError


@pytest.mark.parametrize(
  ("path", "ndim", "letters"),
  [
    ("blocks/mlp/up_df", 2, "df"),
    ("blocks/mlp/up_df", 3, "ldf"),
    ("norm/scale_d", 1, "d"),
    ("scale_d", 2, "ld"),
    ("optimizer/1/0/mu/blocks/attention/query_dnh", 4, "ldnh"),
    ("embed/token_vd", 2, "vd"),
    ("count", 0, ""),
  ],
)
def test_letters_come_from_the_last_part_of_the_path(path, ndim, letters):
  assert letters_of(path, ndim) == letters


@pytest.mark.parametrize(
  ("path", "ndim"),
  [("mlp/up_df", 1), ("mlp/up_df", 4), ("mlp/weight", 2), ("mlp/up_dz", 2), ("up_df/kernel", 2)],
)
def test_an_array_without_its_letters_is_a_user_error(path, ndim):
  with pytest.raises(UserError, match=rf"{path!r} of rank {ndim}"):
    letters_of(path, ndim)


def test_letters_are_single_and_described():
  assert all(len(letter) == 1 and meaning for letter, meaning in LETTERS.items())
