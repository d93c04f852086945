"""Proves that cached, batched generation is what full forward passes one by one would write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.model import Model
from llmjax.serve.generate import generate, generate_ids, stream
from llmjax.serve.prompt import encode_prompts, end_ids
from llmjax.serve.sample import Sampling
from llmjax.text.base import NONE, Settings
from llmjax.text.sentencepiece import SentencePiece
from llmjax.text.tokenizer import fingerprint

pytestmark = pytest.mark.usefixtures("quick_module")

CONTEXT = 40
TEXT = "the quick brown fox jumps over the lazy dög\n"
GREEDY = Sampling(temperature=0, max_tokens=12)
# One to twenty ids: the longest is beyond the smallest bucket of 16.
PROMPTS = [[1, 5, 9], [1], list(range(1, 21)), [1, 80, 3, 3, 7, 60, 2]]


@pytest.fixture(scope="module")
def tokenizer():
  return SentencePiece.train([TEXT * 20], 300)


@pytest.fixture(scope="module")
def model(tiny_config, tokenizer):
  """A random model whose scores are spread enough that rounding decides no token."""
  config = dataclasses.replace(tiny_config, vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
  rng = np.random.default_rng(0)
  lively = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), abstract(config)
  )
  return Model(config, lively, tokenizer)


def naive(model, prompt, count, eos_id=-1, penalty=1.0):
  """Appends the highest-scoring token, `count` times over, to a row padded to the context."""
  ids = list(prompt)
  while len(ids) < min(len(prompt) + count, CONTEXT):
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, : len(ids)] = ids
    scores = np.asarray(model.logits(row))[0, len(ids) - 1].copy()
    for i in set(ids):
      scores[i] = scores[i] * penalty if scores[i] < 0 else scores[i] / penalty
    ordered = np.sort(scores)
    assert ordered[-1] - ordered[-2] > 1e-4  # else rounding could decide
    ids.append(int(np.argmax(scores)))
    if ids[-1] == eos_id:
      break
  return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model):
  return [naive(model, prompt, 12) for prompt in PROMPTS]


def test_greedy_generation_is_the_naive_loop_token_for_token(model, expected):
  for prompt, ids in zip(PROMPTS, expected, strict=True):
    assert generate_ids(model, [prompt], GREEDY) == [ids]
  assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # the model does listen
  assert all(len(set(ids)) > 3 for ids in expected)


def test_prompts_of_unequal_lengths_in_one_batch_are_as_each_alone(model, expected):
  assert generate_ids(model, PROMPTS, GREEDY) == expected
  assert generate_ids(model, PROMPTS[::-1], GREEDY) == expected[::-1]


def test_prompts_read_in_chunks_are_as_read_at_once(model, expected):
  """With the log-probabilities of the new ids, where they are asked for."""
  found = generate_ids(model, PROMPTS, GREEDY, prefill_chunk=3, logprobs=True)
  assert [ids for ids, _ in found] == expected
  for prompt, (ids, logprobs) in zip(PROMPTS, found, strict=True):
    row = prompt + ids
    scores_btv = jax.nn.log_softmax(model.logits([row + [0] * (CONTEXT - len(row))]), axis=-1)
    want = np.asarray(scores_btv)[0, len(prompt) - 1 : len(row) - 1].max(axis=-1)
    assert_allclose(logprobs, want, atol=1e-5)  # fp32, sums in another order
  with pytest.raises(UserError, match="prefill_chunk 1 is less than 2"):
    generate_ids(model, PROMPTS, GREEDY, prefill_chunk=1)


def test_the_same_seed_writes_the_same_and_another_something_else(model):
  def run(seed):
    return generate_ids(model, PROMPTS, Sampling(temperature=3.0, max_tokens=12, seed=seed))

  assert run(1) == run(1)
  assert run(1) != run(2)


def test_what_is_drawn_does_not_depend_on_the_neighbours(model):
  sampling = Sampling(temperature=3.0, top_p=0.9, max_tokens=12, seed=4)
  one = generate_ids(model, PROMPTS, sampling)
  other = generate_ids(model, [PROMPTS[0], [9, 9, 9], PROMPTS[2], [8]], sampling)
  assert (other[0], other[2]) == (one[0], one[2])


def test_a_row_stops_at_eos_and_its_neighbours_go_on(model, expected):
  eos_id = expected[0][4]
  cut = expected[0].index(eos_id) + 1
  found = generate_ids(model, PROMPTS, GREEDY, [eos_id])
  assert found[0] == expected[0][:cut]
  for ids, whole in zip(found, expected, strict=True):
    end = whole.index(eos_id) + 1 if eos_id in whole else 12
    assert ids == whole[:end]
  assert max(len(ids) for ids in found) > cut


def test_the_context_is_filled_and_never_exceeded(model):
  sampling = Sampling(temperature=0, max_tokens=1000)
  prompts = [[1] * 3, [1, 2] * 18, [5] * (CONTEXT - 1)]
  found = generate_ids(model, prompts, sampling)
  assert [len(ids) for ids in found] == [CONTEXT - 3, CONTEXT - 36, 1]
  assert found == [naive(model, prompt, 1000) for prompt in prompts]


def test_max_tokens_is_respected(model, expected):
  found = generate_ids(model, PROMPTS, Sampling(temperature=0, max_tokens=5))
  assert found == [ids[:5] for ids in expected]
  assert generate_ids(model, PROMPTS, Sampling(temperature=0, max_tokens=1)) == [
    ids[:1] for ids in expected
  ]


@pytest.mark.parametrize(("length", "fits"), [(0, False), (CONTEXT - 1, True), (CONTEXT, False)])
def test_a_prompt_that_leaves_no_room_is_a_user_error(model, length, fits):
  prompts = [[1, 2], [1] * length]
  if fits:
    assert len(generate_ids(model, prompts, GREEDY)[1]) == 1
    return
  with pytest.raises(UserError, match=rf"prompt 1 has {length} tokens .* {CONTEXT - 1}"):
    generate_ids(model, prompts, GREEDY)


def test_no_prompts_give_no_completions(model):
  assert generate_ids(model, [], GREEDY) == []
  assert generate(model, []) == []


def test_text_is_continued_after_bos_without_eos(model, tokenizer):
  prompts = ["the fox", "", "dög"]
  found = generate(model, prompts, GREEDY)
  for prompt, made in zip(prompts, found, strict=True):
    ids = naive(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], 12, tokenizer.eos_id)
    stopped = ids[-1] == tokenizer.eos_id
    assert made.ids == (ids[:-1] if stopped else ids)
    assert made.text == tokenizer.decode(made.ids)
    assert made.finish == ("stop" if stopped else "length")


def test_repeated_tokens_are_penalized_in_prompt_and_text(model, expected):
  sampling = dataclasses.replace(GREEDY, repetition_penalty=3.0)
  found = generate_ids(model, PROMPTS, sampling)
  assert found == [naive(model, prompt, 12, penalty=3.0) for prompt in PROMPTS]
  assert found != expected


def test_every_end_of_the_model_ends_a_row(model, tokenizer, expected):
  ids = expected[0][3], expected[2][5]
  settings = dataclasses.replace(tokenizer.settings, ends=[ids[0]])
  ending = SentencePiece(tokenizer.to_bytes(), settings)
  assert end_ids(ending) == [tokenizer.eos_id, ids[0]]
  assert fingerprint(ending) == fingerprint(tokenizer)  # a text's ids are the same
  found = generate_ids(model, PROMPTS, GREEDY, ids)
  for row, whole in zip(found, expected, strict=True):
    cut = min((whole.index(i) + 1 for i in ids if i in whole), default=12)
    assert row == whole[:cut]


def test_a_stop_text_ends_a_row_and_streaming_writes_the_same(model):
  longer = dataclasses.replace(GREEDY, max_tokens=30)
  whole = generate(model, ["the fox"], longer)[0]
  assert "".join(stream(model, "the fox", longer)) == whole.text
  stop = whole.text[3:6]
  stopping = dataclasses.replace(longer, stop=[stop, "never written"])
  made = generate(model, ["the fox"], stopping)[0]
  assert (made.text, made.finish) == (whole.text.partition(stop)[0], "stop")
  assert made.ids == whole.ids[: len(made.ids)] and len(made.ids) <= 6
  pieces = stream(model, "the fox", stopping)
  text = ""
  try:
    while True:
      text += next(pieces)
  except StopIteration as end:
    assert end.value == made
  assert text == made.text
  with pytest.raises(UserError, match="generate_ids takes ends"):
    generate_ids(model, PROMPTS, stopping)


def test_special_tokens_are_text_unless_asked_for(tokenizer, tiny_config):
  plain = encode_prompts(tiny_config, tokenizer, ["fox</s>"]).rows[0]
  assert 2 not in plain and tokenizer.decode(plain) == "fox</s>"
  special = encode_prompts(tiny_config, tokenizer, ["fox</s>"], special=True).rows[0]
  assert special == [1, *tokenizer.encode("fox"), 2]
  with pytest.raises(UserError, match="leave out special"):
    encode_prompts(tiny_config, tokenizer, ["fox</s>"], chat=True, special=True)


def test_without_bos_a_prompt_begins_with_eos(tokenizer, tiny_config):
  gpt2_like = SentencePiece(tokenizer.to_bytes(), Settings(bos_id=NONE))
  found = encode_prompts(tiny_config, gpt2_like, ["", "fox"]).rows
  assert found == [[2], [2, *tokenizer.encode("fox")]]


def test_a_tokenizer_that_goes_without_bos_puts_none_before_a_prompt(tokenizer, tiny_config):
  without = SentencePiece(tokenizer.to_bytes(), Settings(affixes=[[], []]))
  found = encode_prompts(tiny_config, without, ["", "fox"]).rows
  assert found == [[1], tokenizer.encode("fox")]


def test_without_eos_a_row_ends_at_its_length(model, tokenizer):
  endless = SentencePiece(tokenizer.to_bytes(), Settings(eos_id=NONE))
  made = generate(dataclasses.replace(model, tokenizer=endless), ["the fox"], GREEDY)[0]
  assert (made.finish, len(made.ids)) == ("length", GREEDY.max_tokens)


def test_eos_finishes_with_stop_and_is_not_in_the_text(model, tokenizer):
  class Stops:
    """The tokenizer, with an EOS that the model is known to write."""

    bos_id, encode, decode = tokenizer.bos_id, tokenizer.encode, tokenizer.decode
    settings = tokenizer.settings
    eos_id = naive(model, [tokenizer.bos_id, *tokenizer.encode("the fox")], 12)[3]

  made = generate(dataclasses.replace(model, tokenizer=Stops()), ["the fox"], GREEDY)[0]
  assert made.finish == "stop"
  assert Stops.eos_id not in made.ids and len(made.ids) <= 3


def test_a_model_without_a_tokenizer_says_so(model):
  with pytest.raises(UserError, match="no tokenizer"):
    generate(dataclasses.replace(model, tokenizer=None), ["x"])
