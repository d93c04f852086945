"""The figures of a report, counted by hand on a tokenizer whose ids are bytes."""

import pytest

from llmjax.core.errors import UserError
from llmjax.text.raw import Bytes
from llmjax.text.report import report
from tests.text.test_kinds import EVERY, EXACT, TEXTS


def test_bytes_are_counted():
  found = report(Bytes(), ["aé", "", "a"])
  assert (found["documents"], found["bytes"], found["characters"], found["tokens"]) == (3, 4, 3, 4)
  assert (found["bytes_per_token"], found["characters_per_token"]) == (1.0, 0.75)
  assert (found["unknown_rate"], found["exact_rate"]) == (0.0, 1.0)
  assert found["vocabulary_used"] == 3 / 259
  assert found["megabytes_per_s"] > 0 and found["tokens_per_s"] > 0


@pytest.mark.parametrize("kind", EVERY)
def test_exactness_is_what_the_kind_promises(kind):
  found = report(EVERY[kind], TEXTS)
  assert found["exact_rate"] == (1.0 if kind in EXACT else 0.0)
  assert found["bytes_per_token"] > 1 or kind == "bytes"


def test_what_wordpiece_does_not_know_is_counted():
  found = report(EVERY["wordpiece"], ["the ☃ fox", "☃"])
  assert found["unknown_rate"] == 2 / found["tokens"]


def test_no_text_is_a_user_error():
  with pytest.raises(UserError, match="2 documents make no token"):
    report(Bytes(), ["", ""])
