"""Texts as vectors: pooled tokens of each text alone, whatever stands beside it in a batch."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax.cli import main
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.models.pooling import Pooling, from_gguf
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.moe import MoeConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.text.fast import WordPiece
from llmjax.text.raw import Bytes
from llmjax.training.stored import save_model

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
  max_seq_len=24,
  dtype="float32",
  attention=AttentionConfig(bias="all"),
  position=PositionConfig(kind="learned"),
  norm=NormConfig(kind="layer", place="post", bias=True),
  embed=EmbedConfig(types=2, norm=True, head_bias=True),
)


@pytest.fixture(scope="module")
def model():
  return made_of(CONFIG)


def made_of(config):
  tokenizer = WordPiece.train([" ".join(WORDS)] * 20, 60)
  config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
  rng = np.random.default_rng(0)
  made = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), abstract(config)
  )
  return Model(config, made, tokenizer)


def alone(model, text):
  """The last hidden states of one text without padding."""
  tokenizer = model.tokenizer
  ids = [tokenizer.find("[CLS]"), *tokenizer.encode(text), tokenizer.find("[SEP]")]
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


def test_experts_have_as_much_room_for_a_text_in_a_batch_as_alone():
  moe = MoeConfig(experts=4, capacity=0.6)
  model = made_of(dataclasses.replace(CONFIG, layers=1, mlp_bias=False, moe=moe))
  short, long = "the cat sat", "two dogs run over a mat and hills and saw the cat on a mat"
  beside = llmjax.embed(model, [long, short])[1]
  np.testing.assert_allclose(beside, llmjax.embed(model, [short])[0], atol=2e-5)  # fp32, as above


def test_other_poolings_and_unit_length(model):
  texts = ["the cat", "two dogs run over a mat and hills"]
  for pooling, how in (("max", lambda x: x.max(axis=0)), ("cls", lambda x: x[0])):
    made = llmjax.embed(model, texts, pooling=pooling)
    for row, text in zip(made, texts, strict=True):
      want = how(alone(model, text))
      np.testing.assert_allclose(row, want / np.linalg.norm(want), atol=2e-5)  # fp32, as above
  assert llmjax.embed(model, []).shape == (0, 32)


def test_what_cannot_be_embedded_is_named(model):
  with pytest.raises(UserError, match=r"text 1 has 42 tokens .* takes from 1 to 24"):
    llmjax.embed(model, ["a", "a " * 40])
  with pytest.raises(UserError, match="kind 'vision' has no text vectors"):
    kind = types.SimpleNamespace(kind="vision")
    llmjax.embed(dataclasses.replace(model, config=kind), ["a"])
  with pytest.raises(UserError, match="no tokenizer"):
    llmjax.embed(dataclasses.replace(model, tokenizer=None), ["a"])
  with pytest.raises(UserError, match="unknown pooling 'meen'"):
    llmjax.embed(model, ["a"], pooling="meen")


TEXTS = ["the cat", "Two Dogs run over a mat and hills"]
EVERY = {  # sentence-transformers' keys, in the order in which it concatenates
  "pooling_mode_cls_token": lambda x: x[0],
  "pooling_mode_max_tokens": lambda x: x.max(axis=0),
  "pooling_mode_mean_tokens": lambda x: x.mean(axis=0),
  "pooling_mode_mean_sqrt_len_tokens": lambda x: x.sum(axis=0) / np.sqrt(len(x)),
  "pooling_mode_weightedmean_tokens": lambda x: (
    sum(t * row for t, row in enumerate(x, 1)) / (len(x) * (len(x) + 1) / 2)
  ),
  "pooling_mode_lasttoken": lambda x: x[-1],
}


def write_files(folder, pooling, modules=("Transformer", "Pooling"), path="1_Pooling", **files):
  """The files of sentence-transformers beside a model; some of `files` are of other names."""
  for old in folder.glob("*sentence*.json"):
    old.unlink()
  (folder / path).mkdir(exist_ok=True, parents=True)
  (folder / path / "config.json").write_text(json.dumps(pooling))
  kinds = [f"sentence_transformers.models.{kind}" for kind in modules]
  paths = ["", path, "2_Normalize"]
  listed = [{"type": kind, "path": paths[i]} for i, kind in enumerate(kinds)]
  for name, value in {"modules": listed, **files}.items():
    (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sentence") / "hf"
  save_model(model, folder.parent / "checkpoint")
  llmjax.convert(folder.parent / "checkpoint", folder)
  return folder


@pytest.mark.parametrize("keys", [["pooling_mode_cls_token"], list(EVERY)])
def test_a_folder_says_how_it_is_pooled(keys, model, folder):
  write_files(folder, {"word_embedding_dimension": 32} | {key: key in keys for key in EVERY})
  made = llmjax.embed(llmjax.load(folder), TEXTS)
  for row, text in zip(made, TEXTS, strict=True):
    own = alone(model, text)
    want = np.concatenate([EVERY[key](own) for key in EVERY if key in keys])
    np.testing.assert_allclose(row, want, atol=1e-4)  # fp32, sums of up to 12 numbers of order 3


def test_what_a_folder_says_of_texts_is_kept_by_every_format(model, folder, tmp_path):
  write_files(
    folder,
    {"pooling_mode": "lasttoken", "include_prompt": False},
    ("Transformer", "Pooling", "Normalize"),
    "1_Other",
    sentence_bert_config={"max_seq_length": 14, "do_lower_case": True},
    config_sentence_transformers={"prompts": {"q": "saw "}, "default_prompt_name": "q"},
  )
  want = Pooling(("lasttoken",), True, "saw ", False, 14, True)
  assert llmjax.load(folder).pooling == want
  llmjax.convert(folder, tmp_path / "checkpoint", format="checkpoint")
  assert llmjax.load(tmp_path / "checkpoint").pooling == want
  llmjax.convert(tmp_path / "checkpoint", tmp_path / "hf")
  assert llmjax.load(tmp_path / "hf").pooling == want
  loaded = dataclasses.replace(model, pooling=dataclasses.replace(want, modes=("mean", "cls")))
  for row, text in zip(llmjax.embed(loaded, TEXTS), TEXTS, strict=True):
    own = alone(model, "saw " + text.lower())
    vector = np.concatenate([own[0], own[2:].mean(axis=0)])  # [CLS] and "saw" are the prompt
    np.testing.assert_allclose(row, vector / np.linalg.norm(vector), atol=2e-5)  # fp32, as above
  with pytest.raises(UserError, match=r"takes from 1 to 14"):
    llmjax.embed(loaded, ["a " * 12])


def test_what_a_folder_asks_for_and_nobody_knows_is_refused(model, folder, capsys):
  mean = {"pooling_mode_mean_tokens": True}
  for pooling, modules, files, message in (
    (mean, ("Transformer", "Pooling", "Dense"), {}, "'Dense'"),
    (mean, ("Transformer",), {}, "lists .'Transformer'.; known: Transformer, Pooling"),
    (mean | {"pooling_mode_median": True}, ("Transformer", "Pooling"), {}, "pooling_mode_median"),
    ({"pooling_mode_mean_tokens": False}, ("Transformer", "Pooling"), {}, "no pooling known here"),
    ({"pooling_mode": "median"}, ("Transformer", "Pooling"), {}, "unknown pooling 'median'"),
    (
      mean, ("Transformer", "Pooling"),
      {"config_sentence_transformers": {"default_prompt_name": "x"}}, "no prompt 'x' among",
    ),
  ):
    write_files(folder, pooling, modules, **files)
    loaded = llmjax.load(folder)
    with pytest.raises(UserError, match=message):
      llmjax.embed(loaded, ["a"])
    assert llmjax.embed(loaded, ["a"], pooling="mean").shape == (1, 32)
  capsys.readouterr()
  llmjax.embed(model, ["a"])
  assert "says nothing of pooling: mean is taken" in capsys.readouterr().err


def test_a_gguf_file_says_how_it_is_pooled():
  assert from_gguf(None) is None
  found = [from_gguf(kind).modes for kind in (1, 2, 3)]
  assert found == [("mean",), ("cls",), ("lasttoken",)]
  assert "pooling_type is 4" in from_gguf(4).refused


def test_a_decoder_has_vectors_too_and_the_command_prints_cosines(folder, capsys):
  rng = np.random.default_rng(2)
  config = ModelConfig(layers=1, width=16, heads=2, mlp_width=24, vocab_size=259, max_seq_len=24)
  config = dataclasses.replace(config, dtype="float32")
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), abstract(config)
  )
  decoder = Model(config, weights, Bytes(), Pooling(("lasttoken",), False))
  made = llmjax.embed(decoder, ["ab", "a longer one"])
  for row, text in zip(made, [b"ab", b"a longer one"], strict=True):
    tokens = np.array([[256, *text]], np.int32)
    want = weights.hidden(Batch(tokens))[0][0, -1]
    np.testing.assert_allclose(row, want, atol=2e-5)  # fp32, as above
  write_files(folder, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
  argv = ["embed", f"--checkpoint={folder}", "--text=the cat", "--text=the dogs", "--json"]
  assert main(argv) == 0
  *table, last = capsys.readouterr().out.splitlines()
  vectors = np.array(json.loads(last)["vectors"])
  np.testing.assert_allclose(vectors, llmjax.embed(llmjax.load(folder), ["the cat", "the dogs"]))
  one, other = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  assert table[0].split() == ["1.0000", f"{one @ other:.4f}", "the", "cat"]
