"""transformers writes the same tokens: encoder-decoder and images, greedy, from random tiny models.

Their folders are saved by transformers and loaded here, so start ids, image tokens and patches are
those its config files say.
"""

import numpy as np
import pytest

import llmjax
from llmjax.models.vision import patchify
from llmjax.serve.generate import generate_ids
from llmjax.serve.prompt import Prompts
from llmjax.serve.sample import RowSampling, Sampling, filter_logits, penalize
from llmjax.text.folder import save
from llmjax.text.raw import Bytes

pytestmark = pytest.mark.oracle

GREEDY = llmjax.Sampling(temperature=0, max_tokens=8)
IMAGE = 90


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="make test-oracle installs torch")


def lively(torch, model, std=0.3):
  """Spreads a fresh model's weights, so that rounding decides no token."""
  torch.manual_seed(0)
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=std)
  return model.eval()


def written(torch, model, count, **inputs):
  """The ids that transformers writes after a prompt, none of them an end."""
  made = model.generate(
    **inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0
  )
  return made[:, count:].tolist()


def test_t5_writes_what_transformers_writes(torch, tmp_path):
  from transformers import T5Config, T5ForConditionalGeneration

  config = T5Config(
    vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", decoder_start_token_id=5,
    eos_token_id=95,
  )
  theirs = lively(torch, T5ForConditionalGeneration(config))
  theirs.save_pretrained(tmp_path)
  model = llmjax.load(tmp_path)
  assert model.config.embed.start_token == 5
  source = np.random.default_rng(0).integers(6, 90, 11).tolist()
  want = written(torch, theirs, 1, input_ids=torch.tensor([source]))
  assert generate_ids(model, Prompts([[5]], [source]), GREEDY) == want
  assert len(set(want[0])) > 2


def test_llava_writes_what_transformers_writes(torch, tmp_path):
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  config = LlavaConfig(
    vision_config=CLIPVisionConfig(
      image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
      intermediate_size=24,
    ),
    text_config=LlamaConfig(
      vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
      intermediate_size=48, max_position_embeddings=64,
    ),
    image_token_index=IMAGE,
    vision_feature_layer=-1,
  )
  theirs = lively(torch, LlavaForConditionalGeneration(config), 0.7)
  theirs.save_pretrained(tmp_path)
  model = llmjax.load(tmp_path)
  pixels = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
  row = [1, *[IMAGE] * 4, 7, 8]
  want = written(
    torch, theirs, len(row), input_ids=torch.tensor([row]),
    pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
  )
  patches = np.asarray(patchify(pixels, 4))
  assert generate_ids(model, Prompts([row], patches_bsi=patches), GREEDY) == want
  assert generate_ids(model, Prompts([row], patches_bsi=-patches), GREEDY) != want


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.7])
def test_scores_are_changed_as_transformers_changes_them(torch, penalty, top_k):
  from transformers.generation import logits_process as theirs

  rng = np.random.default_rng(0)
  chosen = [(1.0, 1.0, 0.0), (0.7, 0.9, 0.0), (1.3, 1.0, 0.15), (2, 0.8, 0.3)]
  for temperature, top_p, min_p in chosen:
    logits = rng.normal(size=(8, 50)).astype(np.float32) * 3
    ids = rng.integers(0, 50, (8, 12))
    steps = [theirs.RepetitionPenaltyLogitsProcessor(penalty)]
    steps.append(theirs.TemperatureLogitsWarper(float(temperature)))
    steps += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    steps += [theirs.TopPLogitsWarper(top_p), theirs.MinPLogitsWarper(min_p)]
    want = torch.tensor(logits)
    for step in steps:
      want = step(torch.tensor(ids), want)
    seen = np.zeros((8, 50), bool)
    seen[np.arange(8)[:, None], ids] = True
    one = Sampling(temperature, top_k, top_p, min_p=min_p, repetition_penalty=penalty)
    rows = RowSampling.of([one] * 8, [()] * 8)
    found = filter_logits(penalize(logits, seen, rows.penalty_b), rows)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(want.numpy()))
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-6)  # one product and one quotient


def test_a_llama_ends_and_repeats_as_transformers_has_it(torch, tmp_path):
  from transformers import LlamaConfig, LlamaForCausalLM

  config = LlamaConfig(
    vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64, bos_token_id=256, eos_token_id=257,
  )
  theirs = lively(torch, LlamaForCausalLM(config))
  prompt = [256, *b"the fox"]
  make = lambda **how: theirs.generate(  # noqa: E731
    torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=0, **how
  )[0, len(prompt) :].tolist()
  free = make(repetition_penalty=1.8)
  ends = [257, free[9], free[5]]
  theirs.generation_config.eos_token_id = ends
  theirs.save_pretrained(tmp_path)
  save(Bytes(), tmp_path)
  model = llmjax.load(tmp_path)
  sampling = llmjax.Sampling(temperature=0, max_tokens=30, repetition_penalty=1.8)
  want = make(repetition_penalty=1.8)
  assert want == free[: min(free.index(i) for i in ends if i in free) + 1] and len(want) < 30
  made = llmjax.generate(model, ["the fox"], sampling)[0]
  assert (made.ids, made.finish) == (want[:-1], "stop")
  assert generate_ids(model, [prompt], sampling) == [free]
  assert free != make(repetition_penalty=1.0)[: len(free)]
