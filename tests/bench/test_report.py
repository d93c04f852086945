"""Figures from rounds: worked out by hand here."""

import pytest

from llmjax.bench.report import compare, machine, summary, table


def rounds(*rates, **more):
  return [{"tokens_per_s": rate, **more} for rate in rates]


def test_ratio_is_of_rounds_that_ran_side_by_side():
  # The machine was three times slower in the last two rounds: by round 2, 2, 4.
  made = {"ours": rounds(60, 20, 40), "theirs": rounds(30, 10, 10)}
  assert compare(made, "ours")[1]["ratio"] == 2
  with pytest.raises(ValueError):
    compare({"ours": rounds(1, 2), "theirs": rounds(1)}, "ours")


def test_summary_takes_medians_spread_and_the_largest_peak():
  made = summary(
    [
      {"tokens_per_s": 5.0, "peak_bytes": 10, "ids": [1], "seconds": 1},
      {"tokens_per_s": 1.0, "peak_bytes": 30, "ids": [1], "seconds": 3},
      {"tokens_per_s": 9.0, "peak_bytes": 20, "ids": [1], "seconds": 2},
    ]
  )
  assert made == {
    "tokens_per_s": 5.0,
    "least_per_s": 1.0,
    "most_per_s": 9.0,
    "peak_bytes": 30,
    "seconds": 2,
  }


def test_compare_puts_the_base_above_the_peer():
  made = {
    "llmjax": rounds(10, 30, decode_tokens_per_s=8),
    "other": rounds(20, 15, decode_tokens_per_s=2),
  }
  ours, other = compare(made, "llmjax")
  assert (ours["peer"], ours["ratio"]) == ("llmjax", 1)
  assert (other["ratio"], other["decode_ratio"]) == (1.25, 4)  # median of 0.5 and 2
  (alone,) = compare({"other": made["other"]}, "llmjax")
  assert "ratio" not in alone
  # What was too large to run has no rate.
  _, short = compare({"llmjax": [{"temp_bytes": 9}], "other": rounds(10)}, "llmjax")
  assert "ratio" not in short and short["tokens_per_s"] == 10


def test_table_lines_up():
  text = table(["peer", "tokens/s"], [["a", 1234.5], ["longer", None], ["b", 0.256]])
  assert text.splitlines() == [
    "peer    tokens/s",
    "a          1,234",
    "longer         –",
    "b           0.26",
  ]


def test_machine_names_what_figures_are_of():
  made = machine()
  assert made["cpu"] and made["cores"] >= 1 and "jax" in made["versions"]
