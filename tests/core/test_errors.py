"""Proves that error messages name the nearest thing there is, or all there is."""

import pytest

from llmjax.core.errors import UserError, nearest


def test_a_near_name_is_proposed():
  assert nearest("learnin_rate", ["learning_rate", "warmup"]) == "did you mean 'learning_rate'?"


def test_what_exists_is_listed_where_nothing_is_near():
  assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_long_lists_are_cut_and_counted():
  message = nearest("zzz", [f"{n:02}" for n in range(40)])
  assert message.startswith("known: 00, 01") and message.endswith("(40 in all)")
  assert "39" not in message


def test_nothing_known_is_said():
  assert nearest("x", []) == "there are none"


def test_a_user_error_is_a_value_error():
  with pytest.raises(ValueError, match="no"):
    raise UserError("no")
