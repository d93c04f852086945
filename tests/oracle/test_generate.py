"""transformers writes the same tokens: encoder-decoder and images, greedy, from random tiny models.

Their folders are saved by transformers and loaded here, so start ids, image tokens and patches are
those its config files say.
"""

import numpy as np
import PIL.Image
import pytest

import llmjax
from llmjax.models.config import VisionConfig
from llmjax.models.vision import patchify
from llmjax.serve.generate import generate_ids
from llmjax.serve.image import read_image
from llmjax.serve.prompt import Prompts

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


@pytest.mark.parametrize("size", [(50, 31), (20, 45), (24, 24)])
def test_images_are_prepared_as_clips_are(size):
  from transformers.models.clip import image_processing_pil_clip as clip

  rng = np.random.default_rng(0)
  image = PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
  processor = clip.CLIPImageProcessorPil(
    size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
  )
  want = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  found = read_image(image, VisionConfig(image_size=24, patch=8))
  # Both round what they scale to whole numbers of 255; the rest is fp32.
  np.testing.assert_allclose(found, patchify(want[None], 8)[0], atol=1e-5)
