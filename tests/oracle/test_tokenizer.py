"""transformers reads the folders we write and we read the ones it writes; chats render alike."""

import json
import re

import pytest

from llmjax.core.errors import UserError
from llmjax.data.tasks import marks_of
from llmjax.text import chat
from llmjax.text.base import Settings, bos_eos
from llmjax.text.folder import load_tokenizer, save
from llmjax.text.tokenizer import framed, start_id
from tests.text import chats, test_added
from tests.text.test_around import PROCESSORS, write
from tests.text.test_kinds import EVERY

pytestmark = pytest.mark.oracle

TEXTS = [
  "",
  "the quick brown fox",
  "  leading, trailing  ",
  "def main():\n    return 'héllo wörld'  # 3333 ½\n\n\t\r\n",
  "e\u0301 ﬁ 🦙 我想 don't WE'LL \U0010ffff",
]
FIELD = {
  "gpt2": "gpt2",
  "cl100k": "cl100k/cl100k_base.tiktoken",
  "neox": "neox/20B_tokenizer.json",
  "bert": "bert/vocab.txt",
  "mistral v1": "mistral/tokenizer.model.v1",
  "mistral v3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
  "sentencepiece's own": "sentencepiece_tests/test_model.model",
}


def same_in_transformers(tokenizer, folder, affixes=None):
  from transformers import AutoTokenizer

  save(tokenizer, folder, affixes)
  theirs = AutoTokenizer.from_pretrained(folder)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids, text
    before, after = load_tokenizer(folder).settings.affixes
    assert theirs.encode(text) == [*before, *ids, *after] and affixes in (None, [before, after])
    if tokenizer.unk_id not in ids:  # the libraries spell UNK differently
      assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
  for token, i in tokenizer.special_tokens.items():
    assert theirs.convert_tokens_to_ids(token) == i
    assert theirs.encode(f"fox{token}fox", add_special_tokens=False) == tokenizer.encode(
      f"fox{token}fox", allow_special=True
    )
  for name in ("bos_id", "eos_id", "pad_id"):
    assert getattr(theirs, f"{name[:3]}_token_id") == getattr(tokenizer, name), name
  return theirs


@pytest.mark.parametrize("kind", EVERY)
def test_transformers_reads_what_we_trained(kind, tmp_path):
  same_in_transformers(EVERY[kind], tmp_path)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_transformers_puts_around_a_text_what_we_do(kind, bos, eos, tmp_path):
  tokenizer = EVERY[kind]
  first, last = start_id(tokenizer) if bos else None, tokenizer.eos_id if eos else None
  same_in_transformers(tokenizer, tmp_path, bos_eos(first, last))


@pytest.mark.parametrize("name", FIELD)
def test_transformers_reads_files_of_the_field_that_we_saved(name, tmp_path, shared_data):
  same_in_transformers(load_tokenizer(shared_data / "tokenizers" / FIELD[name]), tmp_path)


def test_we_read_what_transformers_writes(tmp_path):
  kind = EVERY["bpe"]
  ours = type(kind)(kind.to_bytes(), Settings(chat_template=chats.CHATML))
  theirs = same_in_transformers(ours, tmp_path / "ours")
  assert theirs.chat_template == chats.CHATML
  theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  theirs.eos_token, theirs.bos_token = "<|im_end|>", None
  theirs.save_pretrained(tmp_path / "theirs")
  again = load_tokenizer(tmp_path / "theirs")
  assert (again.kind, again.chat_template) == ("bpe", chats.CHATML)
  assert (again.bos_id, again.eos_id) == (None, theirs.eos_token_id)
  ids = theirs.apply_chat_template(chats.SYSTEM, add_generation_prompt=True, return_dict=False)
  assert chat.encode_chat(again, chats.SYSTEM, add_generation_prompt=True) == ids


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
  """A folder's tokenizer as we and as transformers read it."""
  from transformers import AutoTokenizer

  folder = tmp_path_factory.mktemp("chatting")
  save(EVERY["bpe"], folder)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config |= {"sep_token": "<|sep|>", "image_token": "<|image|>", "pad_token": None, "affixes": None}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("given", [(), ("tools",), ("documents",)], ids="+".join)
@pytest.mark.parametrize("conversation", chats.CONVERSATIONS)
@pytest.mark.parametrize("family", chats.TEMPLATES)
def test_chats_render_as_in_transformers(family, conversation, given, prompt, chatting):
  from transformers.utils.chat_template_utils import render_jinja_template

  ours, theirs = chatting
  template, messages = chats.TEMPLATES[family], chats.CONVERSATIONS[conversation]
  values = {"tools": chats.TOOLS, "documents": chats.DOCUMENTS}
  values = {name: values[name] for name in given}
  how = {"chat_template": template, "add_generation_prompt": prompt, **values}
  try:
    text = theirs.apply_chat_template(messages, tokenize=False, **how)
  except Exception as error:  # a template's own refusal, and what it does with values it lacks
    with pytest.raises(UserError, match=re.escape(" ".join(str(error).split()))):
      chat.render(template, messages, prompt, **chat.token_values(ours), **values)
    return
  made, found = chat.spans(template, messages, prompt, **chat.token_values(ours), **values)
  assert made == text
  if found:
    how |= {"conversations": [messages], "return_assistant_tokens_mask": True}
    assert render_jinja_template(**how, **theirs.special_tokens_map)[1] == [found]


@pytest.mark.parametrize("case", PROCESSORS)
def test_prompts_are_framed_as_in_transformers(case, tmp_path):
  from transformers import AutoTokenizer

  processor, flags, _ = PROCESSORS[case]
  ours = write(tmp_path, processor, {"tokenizer_class": "PreTrainedTokenizerFast", **flags})
  theirs = AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS[1:]:
    assert framed(ours, "decoder", ours.encode(text)) == theirs.encode(text)


# folder of a tokenizer.json → the config.json that tells transformers which class of its to take
REAL = {
  "smollm2-135m": {"model_type": "llama"},
  "tokenizers/neox": {"model_type": "gpt_neox"},
  "minilm-l6": {"model_type": "bert"},
}


@pytest.mark.parametrize("name", REAL)
def test_real_folders_are_framed_as_in_transformers(name, tmp_path, shared_data):
  from transformers import AutoTokenizer

  source = next((shared_data / name).glob("*tokenizer.json"))
  (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
  (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
  theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
  for text in TEXTS[1:]:
    assert framed(ours, "decoder", ours.encode(text)) == theirs.encode(text)


def test_added_tokens_are_found_and_come_back_as_in_transformers(tmp_path):
  from transformers import AutoTokenizer

  (tmp_path / "tokenizer.json").write_bytes(EVERY["bpe"].to_bytes())
  said = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[left]"}
  test_added.put(tmp_path, tokenizer_config={**said, **test_added.config()})
  ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
  for text in [*test_added.CASES, "[p] [end][left]", "a[right]\n\nb[word]"]:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, allow_special=True) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_masks_and_sentinels_are_those_of_transformers(tmp_path):
  from transformers import T5Tokenizer

  pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "▁a"]
  t5 = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=100)
  t5.save_pretrained(tmp_path)
  expected = t5.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
  assert marks_of("span_corruption", load_tokenizer(tmp_path)) == tuple(expected)


def test_the_mask_of_a_published_bert_is_that_of_transformers(shared_data):
  from transformers import AutoTokenizer

  folder = shared_data / "minilm-l6"
  theirs = AutoTokenizer.from_pretrained(folder).mask_token_id
  assert marks_of("masked_lm", load_tokenizer(folder)) == (theirs,) == (103,)
