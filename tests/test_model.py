"""What a notebook does with a model: text, ids or messages, one or many, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import llmjax
from llmjax import Sampling, UserError
from llmjax.models.build import abstract
from llmjax.text.sentencepiece import SentencePiece

pytestmark = pytest.mark.usefixtures("quick_module")

TEXT = "the quick brown fox jumps over the lazy dog\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
  "{% if add_generation_prompt %}assistant: {% endif %}"
GREEDY = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny_config):
  plain = SentencePiece.train([TEXT * 20], 300)
  settings = dataclasses.replace(plain.settings, chat_template=TEMPLATE)
  tokenizer = SentencePiece(plain.to_bytes(), settings)
  config = dataclasses.replace(tiny_config, vocab_size=tokenizer.vocab_size, max_seq_len=64)
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract(config)
  )
  return llmjax.Model(config, weights, tokenizer)


def test_one_string_is_one_prompt_and_a_list_is_several(model):
  one, two = "the quick", "a lazy fox"
  single = model.generate(one, **GREEDY)
  assert isinstance(single, llmjax.Completion)
  assert str(single) == single.text
  both = llmjax.generate(model, [one, two], Sampling(**GREEDY))
  assert both[0].ids == single.ids
  ids = model.encode(one)
  assert model.generate(ids, **GREEDY).ids == single.ids  # ids are taken as they are
  assert model.generate(np.array([ids]), **GREEDY)[0].ids == single.ids
  assert "".join(llmjax.stream(model, one, Sampling(**GREEDY))) == single.text


def test_messages_are_a_chat(model):
  messages = [{"role": "user", "content": "the dog"}]
  rendered = model.tokenizer.encode("user: the dog\nassistant: ", allow_special=True)
  answer = model.chat(messages, **GREEDY)
  assert answer.ids == model.generate(rendered, **GREEDY).ids
  assert model.chat("the dog", **GREEDY).ids == answer.ids
  assert llmjax.generate(model, [messages, messages], Sampling(**GREEDY))[1].ids == answer.ids
  longer = [*messages, answer.message, {"role": "user", "content": "jumps"}]
  assert longer[1] == {"role": "assistant", "content": answer.text}
  assert model.encode(longer)[: len(model.encode(messages))] == model.encode(messages)


def test_rows_of_unequal_lengths_are_as_each_alone(model):
  long, short = "the quick brown fox", "the dog"
  both = np.asarray(model.logits([long, short]))
  lengths = [len(model.encode(text)) for text in (long, short)]
  assert both.shape[:2] == (2, max(lengths))
  for row, text, length in zip(both, (long, short), lengths, strict=True):
    alone = np.asarray(model.logits(text))
    assert alone.shape == (length, model.config.vocab_size)
    # Sums of 32 to 64 terms of order 1 in another order: 2^3 roundings of the largest logit.
    assert_allclose(row[:length], alone, rtol=0, atol=1e-6 * np.abs(alone).max())
    assert np.isnan(row[length:]).all()
  states = model.hidden([long, short], layers=[0, -1])
  assert states.shape == (2, 2, max(lengths), 32)
  assert np.isnan(np.asarray(states)[:, 1, lengths[1] :]).all()
  assert model.hidden(short, [0, 1]).shape == (2, lengths[1], 32)
  assert model.hidden(short).shape == (lengths[1], 32)
  maps = np.asarray(model.attention([long, short]))
  assert maps.shape == (2, 2, 4, max(lengths), max(lengths))
  assert_allclose(maps[:, 1, :, : lengths[1]].sum(-1), 1, rtol=1e-5)
  assert np.isnan(maps[:, 1, :, lengths[1] :]).all()


def test_loss_and_logprobs_are_those_of_the_logits(model):
  texts = ["the quick brown fox", "the dog"]
  losses, logprobs = model.loss(texts), np.asarray(model.logprobs(texts))
  for number, text in enumerate(texts):
    ids, logits = model.encode(text), np.asarray(model.logits(text), np.float64)
    total = np.log(np.exp(logits).sum(-1))
    expected = [logits[i, ids[i + 1]] - total[i] for i in range(len(ids) - 1)]
    assert_allclose(logprobs[number, : len(ids) - 1], expected, rtol=0, atol=1e-5)
    assert_allclose(losses[number], -np.mean(expected), rtol=1e-5)
  assert isinstance(model.loss(texts[0]), float)


def test_several_texts_or_one_are_embedded(model):
  both, one = (model.embed(texts, pooling="mean") for texts in (["the dog", "a fox"], "a fox"))
  assert_allclose(both[1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m: m.logits(3.5), "inputs are text, token ids .* not float"),
    (lambda m: m.logits(b"hello"), "not bytes"),
    (lambda m: m.logits([[1, 2], [3, 0.5]]), "token ids are integers, not 0.5"),
    (lambda m: m.logits(np.zeros((1, 2, 3), int)), "1 or 2 axes, not 3"),
    (lambda m: m.logits([]), "there is no input"),
    (lambda m: m.logits([[]]), "input 0 has 0 tokens"),
    (lambda m: m.logits([[1, 300]]), "token ids run from 1 to 300"),
    (lambda m: m.logits("the " * 100), "input 0 has .* tokens .*context of 64"),
    (lambda m: m.loss([5]), "input 0 has one token"),
    (lambda m: m.hidden("a", layers=[7]), "no layer 7"),
    (lambda m: m.generate("a", heat=1), "no option heat of sampling"),
    (lambda m: m.generate("a", Sampling(), seed=1), "give seed inside of Sampling"),
    (lambda m: m.chat(["a", "b"]), "chat takes a list of messages"),
    (lambda m: dataclasses.replace(m, tokenizer=None).logits("a"), "no tokenizer: give token ids"),
    (lambda m: llmjax.stream(m, ["a", "b"]), "stream takes one prompt"),
    (lambda m: m.embed([1, 2]), "embed takes texts, not list"),
    (lambda m: m.generate(None), "not NoneType"),
  ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(model, call, message):
  with pytest.raises(UserError, match=message):
    call(model)


def test_configs_are_taken_frozen_or_editable():
  editable = llmjax.defaults(llmjax.Config)
  editable.model.width = 64
  frozen = dataclasses.replace(llmjax.Config(), model=dataclasses.replace(
    llmjax.Config().model, width=64
  ))
  assert llmjax.count_parameters(editable) == llmjax.count_parameters(frozen)
  editable.model.vocab_size = 5000
  assert llmjax.count_parameters(editable.model) == llmjax.count_parameters(
    dataclasses.replace(frozen.model, vocab_size=5000)
  )
  planned = llmjax.plan(editable, "h100:8")
  assert planned["parameters"] == llmjax.count_parameters(editable)
  with pytest.raises(UserError, match="vocab_size is 0"):
    llmjax.count_parameters(frozen.model)
  with pytest.raises(UserError, match=r"a config is .* not str"):
    llmjax.plan("experiments/quickstart.py", "h100:8")


def test_sampling_defaults_are_the_same_everywhere():
  config = llmjax.Config().sample
  assert (config.temperature, config.top_p, config.max_tokens) == (
    Sampling().temperature, Sampling().top_p, Sampling().max_tokens
  )


