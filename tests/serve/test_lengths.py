"""How long a prompt and its continuation may be, by the way rotary positions are stretched."""

import numpy as np
import pytest

import llmjax
from llmjax.core.errors import UserError
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from tests import golden

GREEDY = Sampling(max_tokens=3, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_module):
  """Compiles without most optimizations."""


def rows(*lengths):
  """Rows of ids, the same beginning for all."""
  ids = np.random.default_rng(7).integers(4, 36, max(lengths))
  return [ids[:length].tolist() for length in lengths]


def greedy(model, row, new):
  """What a model writes without a cache, its whole row read anew for every token."""
  row, length = list(row), len(row)
  for _ in range(new):
    row.append(int(np.argmax(model.logits([row])[0, -1])))
  return row[length:]


@pytest.mark.parametrize("name", ["qwen25_readme_yarn", "vicuna16k"])
def test_thirty_tokens_and_three_more_fit_where_four_times_sixteen_are_allowed(name, shared_data):
  model = llmjax.load(shared_data.parent / "cases" / "context_after_scaling" / name)
  assert model.config.max_seq_len == 64
  (prompt,) = rows(30)
  assert generate_ids(model, [prompt], GREEDY) == [greedy(model, prompt, 3)]
  with pytest.raises(UserError, match="64"):
    generate_ids(model, rows(64), GREEDY)


def test_a_linear_stretch_extends_the_context_of_a_folder():
  model = llmjax.load(golden.FOLDER / "llama_linear")  # 32 positions, stretched by 2
  (prompt,) = rows(40)
  assert generate_ids(model, [prompt], GREEDY) == [greedy(model, prompt, 3)]


def test_longrope_goes_by_each_rows_own_length():
  model = llmjax.load(golden.FOLDER / "phi3_longrope")  # long from 9 positions on
  short, long = rows(5, 12)
  want = [greedy(model, short, 3), greedy(model, long, 3)]
  assert generate_ids(model, [short, long], GREEDY) == want
  assert generate_ids(model, [short], GREEDY) == want[:1]
  assert generate_ids(model, [long], GREEDY) == want[1:]
  with pytest.raises(UserError, match=r"6 tokens and 3 new ones pass position 8.*at most 2 new"):
    generate_ids(model, rows(12, 6), GREEDY)
