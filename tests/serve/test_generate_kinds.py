"""Proves that cached writing of other kinds is what full forward passes one by one would write."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.formats.hf import folder as hf
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig, VisionConfig
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.moe import MoeConfig
from llmjax.nn.position import PositionConfig
from llmjax.serve import generate as serving
from llmjax.serve.generate import generate, generate_ids
from llmjax.serve.prompt import Prompts, encode_prompts
from llmjax.serve.sample import RowSampling, Sampling
from llmjax.serve.state import prefill
from llmjax.text.base import Settings
from llmjax.training.config import Config
from tests import golden

pytestmark = pytest.mark.usefixtures("quick_module")

CONTEXT = 24
GREEDY = Sampling(temperature=0, max_tokens=6)
IMAGE = 90  # the image token of `seeing`
BASE = ModelConfig(
  layers=2, width=32, heads=4, mlp_width=48, vocab_size=96, max_seq_len=CONTEXT, dtype="float32"
)
T5 = dataclasses.replace(
  BASE,
  kind="encoder_decoder",
  encoder_layers=1,
  activation="geglu_tanh",
  tie_embeddings=False,
  position=PositionConfig(kind="relative", buckets=8, max_distance=16),
  embed=EmbedConfig(start_token=0),
)
LLAVA = dataclasses.replace(
  BASE,
  vision=VisionConfig(
    image_size=8, patch=4, image_token=IMAGE, layers=1, width=16, heads=2, mlp_width=24
  ),
)
PREFIX = dataclasses.replace(BASE, attention=AttentionConfig(mask="prefix"))


class Letters:
  """A tokenizer of one id a letter: `a` is 10."""

  bos_id, eos_id, chat_template, settings = 1, 2, None, Settings()
  special_tokens = types.MappingProxyType({"<image>": IMAGE})

  def encode(self, text, allow_special=False):
    return [ord(letter) - 87 for letter in text]

  def decode(self, ids):
    return "".join(chr(i + 87) for i in ids)


class Spelling(Letters):
  """The same, its special token read where it is spelled."""

  def encode(self, text, allow_special=False):
    return [IMAGE] * text.count("<image>") * allow_special + super().encode(text[-1:])


def lively(config) -> Model:
  """A random model whose scores are spread enough that rounding decides no token."""
  rng = np.random.default_rng(0)
  made = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), abstract(config)
  )
  return Model(config, made, Letters())


@pytest.fixture(scope="module")
def translating():
  return lively(T5)


@pytest.fixture(scope="module")
def seeing():
  return lively(LLAVA)


@jax.jit
def scores(model, batch):
  return model.logits(model.hidden(batch)[0])


def naive(model, row, **fields):
  """Appends the highest-scoring token six times over; `fields` is the rest of the batch."""
  ids = list(row)
  for _ in range(6):
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(ids)] = ids
    found = np.asarray(scores(model.parameters, Batch(tokens, **fields)))[0, len(ids) - 1]
    ordered = np.sort(found)
    assert ordered[-1] - ordered[-2] > 1e-4  # else rounding could decide
    ids.append(int(np.argmax(found)))
  return ids[len(row) :]


def test_an_encoder_decoder_writes_what_full_passes_write(translating):
  sources = [[5, 9, 33, 2], [60, 2], list(range(20, 38))]
  want = [naive(translating, [0], source_bs=np.array([source], np.int32)) for source in sources]
  assert generate_ids(translating, Prompts([[0]] * 3, sources), GREEDY) == want
  assert len({tuple(ids) for ids in want}) == 3  # the sources matter


def test_an_encoder_decoders_prompt_is_its_source(translating):
  found = encode_prompts(T5, Letters(), ["abc"])
  assert (found.rows, found.sources) == ([[0]], [[10, 11, 12, 2]])
  own = dataclasses.replace(T5, embed=EmbedConfig())
  assert encode_prompts(own, Letters(), ["abc"]).rows == [[1]]
  made = generate(translating, ["abc"], GREEDY)[0]
  ids = naive(translating, [0], source_bs=np.array([[10, 11, 12, 2]], np.int32))
  assert made.ids == (ids[: ids.index(2)] if 2 in ids else ids)


def test_a_source_of_another_vocabulary_is_given_as_ids():
  model = hf.load_folder(golden.FOLDER / "marian_apart")  # 41 source ids, 37 target ids
  source, row = [40, 38, 7, 2], [0]
  scores = jax.jit(lambda model, batch: model.logits(model.hidden(batch)[0])[0])
  for _ in range(4):  # the decoder is causal: what follows a token does not reach it
    tokens = np.zeros((1, 5), np.int32)
    tokens[0, : len(row)] = row
    scores_tv = scores(model.parameters, Batch(tokens, source_bs=np.array([source], np.int32)))
    row = [*row, int(np.argmax(scores_tv[len(row) - 1]))]
  greedy = Sampling(temperature=0, max_tokens=4)
  assert generate_ids(model, Prompts([[0]], [source]), greedy) == [row[1:]]
  with pytest.raises(UserError, match="another vocabulary"):
    encode_prompts(model.config, Letters(), ["abc"])
  with pytest.raises(UserError, match="train has one tokenizer"):
    Config(model=model.config).known_task()


def test_a_decoder_with_images_writes_what_full_passes_write(seeing):
  rng = np.random.default_rng(1)
  patches = rng.normal(size=(3, 8, 48)).astype(np.float32)
  one, two = [IMAGE] * 4, [IMAGE] * 8
  rows = [[1, *one, 7, 8], [1, 5, *two], [1, 6, 9]]
  want = [
    naive(seeing, rows[0], patches_bsi=patches[:1, :4]),
    naive(seeing, rows[1], patches_bsi=patches[1:2]),
    naive(seeing, rows[2]),
  ]
  assert generate_ids(seeing, Prompts(rows, patches_bsi=patches), GREEDY) == want
  other = generate_ids(seeing, Prompts(rows, patches_bsi=-patches), GREEDY)
  assert (other[0] != want[0]) and other[2] == want[2]  # the images matter, where there are any


def test_a_prefix_model_sees_its_whole_prompt(seeing):
  model = lively(PREFIX)
  rows = [[1, 5, 9, 3, 40], [1, 7]]
  want = [
    naive(model, row, prefix_bt=np.arange(CONTEXT)[None] < len(row)) for row in rows
  ]
  assert generate_ids(model, rows, GREEDY) == want
  assert want[0] != naive(model, rows[0])  # a causal reading is another


def test_images_stand_where_the_prompt_says_or_before_it(tmp_path):
  file = tmp_path / "a.png"
  PIL.Image.fromarray(np.full((9, 13, 3), 200, np.uint8)).save(file)
  encode = lambda text, images: encode_prompts(LLAVA, Letters(), [text], [images])  # noqa: E731
  patches = [IMAGE] * 4
  assert encode("ab", [file]).rows == [[1, *patches, 10, 11]]
  assert encode("a<image>b", [file]).rows == [[1, 10, *patches, 11]]
  assert encode("<image>a<image>", [file, file]).rows == [[1, *patches, 10, *patches]]
  assert encode("a", [file, file]).patches_bsi.shape == (1, 8, 48)
  mixed = encode_prompts(LLAVA, Letters(), ["a", "b"], [[file], []])
  assert mixed.rows == [[1, *patches, 10], [1, 11]] and not mixed.patches_bsi[1].any()
  with pytest.raises(UserError, match="the prompt has 2 image tokens for 1 images"):
    encode("<image>a<image>", [file])
  with pytest.raises(UserError, match="the prompt has 1 image tokens for 0 images"):
    encode_prompts(LLAVA, Spelling(), ["<image>a"], special=True)


def test_prompts_that_a_model_does_not_take_are_refused(translating, tmp_path):
  with pytest.raises(UserError, match="this model takes no images"):
    encode_prompts(BASE, Letters(), ["a"], [["x.png"]])
  with pytest.raises(UserError, match="kind 'encoder' writes no text"):
    encode_prompts(dataclasses.replace(BASE, kind="encoder"), Letters(), ["a"])
  with pytest.raises(UserError, match=r"source 0 has 41 tokens .* takes from 1 to 24"):
    generate(translating, ["a" * 40])
  with pytest.raises(UserError, match=r"x.png': No such file"):
    encode_prompts(LLAVA, Letters(), ["a"], [[tmp_path / "x.png"]])
  (tmp_path / "x.png").write_text("text")
  with pytest.raises(UserError, match="not an image"):
    encode_prompts(LLAVA, Letters(), ["a"], [[tmp_path / "x.png"]])
  with pytest.raises(UserError, match="no chat template"):
    encode_prompts(BASE, Letters(), ["a"], chat=True)


def test_experts_choose_of_a_prompt_beside_a_longer_one_what_they_choose_of_it_alone():
  moe = MoeConfig(experts=8, router="expert_choice", capacity=0.5)
  model = lively(dataclasses.replace(BASE, moe=moe))
  rows = [[1, 5, 9, 33, 21], list(range(1, 19))]

  def after_the_first(rows):
    batch = serving._batch(Prompts(rows), CONTEXT)
    sampling = RowSampling.of([GREEDY] * len(rows), [()] * len(rows))
    left_b = np.ones(len(rows), np.int32)
    state = prefill(model.decoding, batch, sampling, left_b, slots=CONTEXT)
    return state.token_b[0], state.logprob_b[0]

  (token, logprob), (alone, logprob_alone) = after_the_first(rows), after_the_first(rows[:1])
  assert token == alone
  # fp32 sums in another order; the scores are of order 1 to 10.
  np.testing.assert_allclose(logprob, logprob_alone, atol=2e-5)


def test_how_a_router_that_looks_ahead_decodes_is_said_once(monkeypatch, capsys):
  serving._say_how_it_decodes.cache_clear()
  zero_b = np.zeros(1, np.int32)
  ended = types.SimpleNamespace(token_b=zero_b, logprob_b=zero_b, left_b=zero_b)
  monkeypatch.setattr(serving, "prefill", lambda *_, **__: ended)
  monkeypatch.setattr(Model, "mesh", None)
  for router in ("softmax", "expert_choice", "expert_choice"):
    model = Model(dataclasses.replace(BASE, moe=MoeConfig(experts=4, router=router)), None)
    monkeypatch.setattr(Model, "decoding", None)
    generate_ids(model, [[1, 5]], GREEDY)
  told = capsys.readouterr().err
  assert told.count("\n") == 1 and told.endswith("stands alone and goes to all 4 of them\n")
