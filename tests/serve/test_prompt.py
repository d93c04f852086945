"""What chats put around a prompt: images where the template says, and what ends an answer."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig, VisionConfig
from llmjax.serve.prompt import Prompts, check_prompts, encode_prompts, end_ids
from llmjax.text.base import Settings
from llmjax.text.sentencepiece import SentencePiece

IMAGE, END = 300, 301
TEMPLATE = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>
{% elif m['content'] is string %}{{ m['content'] }}<|end|>{% else %}{% for part in m['content'] %}
{%- if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}<|end|>{% endif %}{% endfor %}"""
CONFIG = ModelConfig(
  vocab_size=302,
  max_seq_len=64,
  vision=VisionConfig(
    image_size=8, patch=4, image_token=IMAGE, layers=1, width=16, heads=2, mlp_width=24
  ),
)


@pytest.fixture(scope="module")
def tokenizer():
  trained = SentencePiece.train(["the quick brown fox jumps over the lazy dog\n" * 20], 300)
  added = {"<image>": IMAGE, "<|end|>": END}
  return SentencePiece(trained.to_bytes(), Settings(added=added, chat_template=TEMPLATE))


def test_a_chat_has_its_images_where_the_template_puts_them(tokenizer, tmp_path):
  file = tmp_path / "a.png"
  PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
  found = encode_prompts(CONFIG, tokenizer, ["the fox"], [[file]], chat=True)
  assert found.rows == [[*[IMAGE] * 4, *tokenizer.encode("the fox"), END]]
  assert found.patches_bsi.shape == (1, 4, 48)
  typed = encode_prompts(CONFIG, tokenizer, ["<image> fox"], [[file]], chat=True).rows[0]
  assert typed.count(IMAGE) == 4  # what a user spells out is text
  plain = encode_prompts(CONFIG, tokenizer, ["the fox"], chat=True)
  assert plain.rows == [[*tokenizer.encode("the fox"), END]]


def test_an_answer_ends_with_eos_or_what_ends_a_turn(tokenizer):
  assert end_ids(tokenizer) == [tokenizer.eos_id]
  assert end_ids(tokenizer, chat=True) == [tokenizer.eos_id, END]
  own = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
  settings = dataclasses.replace(tokenizer.settings, chat_template=own)
  other = SentencePiece(tokenizer.to_bytes(), settings)
  assert end_ids(other, chat=True) == [tokenizer.eos_id]


def test_room_is_one_more_than_a_prompt():
  check_prompts(Prompts([[1] * 9], [[1] * 10]), 10)
  with pytest.raises(UserError, match=r"prompt 1 has 10 tokens .* takes from 1 to 9"):
    check_prompts(Prompts([[1], [1] * 10]), 10)
  with pytest.raises(UserError, match="source 0 has 0 tokens"):
    check_prompts(Prompts([[1]], [[]]), 10)
