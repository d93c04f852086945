"""Texts as vectors: pooled tokens of each text alone, whatever stands beside it in a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention import AttentionConfig
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.text.fast import WordPiece

pytestmark = pytest.mark.usefixtures("quick_module")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "over", "hills"]
CONFIG = ModelConfig(
  kind="encoder",
  layers=2,
  width=32,
  heads=4,
  mlp_width=48,
  activation="gelu",
  mlp_bias=True,
  context=24,
  dtype="float32",
  attention=AttentionConfig(bias="all"),
  position=PositionConfig(kind="learned"),
  norm=NormConfig(kind="layer", place="post", bias=True),
  embed=EmbedConfig(types=2, norm=True, head_bias=True),
)


@pytest.fixture(scope="module")
def model():
  tokenizer = WordPiece.train([" ".join(WORDS)] * 20, 60)
  config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
  rng = np.random.default_rng(0)
  made = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), abstract(config)
  )
  return Model(config, made, tokenizer)


def alone(model, text):
  """The last hidden states of one text without padding."""
  tokenizer = model.tokenizer
  ids = [tokenizer.find("[CLS]"), *tokenizer.encode(text), tokenizer.find("[SEP]")]
  from llmjax.data.batch import Batch

  return np.asarray(model.parameters.features(Batch(np.array([ids], np.int32))))[0]


def test_every_text_is_the_mean_of_its_own_tokens(model):
  rng = np.random.default_rng(1)
  texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(35)]
  made = llmjax.embed(model, texts, normalize=False)
  assert made.shape == (35, 32) and made.dtype == np.float32
  for number in (0, 3, 17, 34):
    want = alone(model, texts[number]).mean(axis=0)
    # fp32; padding changes the order of attention's sums and of the mean's.
    np.testing.assert_allclose(made[number], want, atol=2e-5)
  assert np.abs(made[0] - made[3]).max() > 0.01


def test_other_poolings_and_unit_length(model):
  texts = ["the cat", "two dogs run over a mat and hills"]
  for pooling, how in (("max", lambda x: x.max(axis=0)), ("first", lambda x: x[0])):
    made = llmjax.embed(model, texts, pooling=pooling)
    for row, text in zip(made, texts, strict=True):
      want = how(alone(model, text))
      np.testing.assert_allclose(row, want / np.linalg.norm(want), atol=2e-5)  # fp32, as above
  assert llmjax.embed(model, []).shape == (0, 32)


def test_what_cannot_be_embedded_is_named(model, tiny_config):
  with pytest.raises(UserError, match=r"text 1 has 42 tokens .* takes from 1 to 24"):
    llmjax.embed(model, ["a", "a " * 40])
  with pytest.raises(UserError, match="kind 'decoder' has no text vectors"):
    llmjax.embed(Model(tiny_config, None), ["a"])
  with pytest.raises(UserError, match="no tokenizer"):
    llmjax.embed(dataclasses.replace(model, tokenizer=None), ["a"])
  with pytest.raises(UserError, match="unknown pooling 'meen'"):
    llmjax.embed(model, ["a"], pooling="meen")
