"""Files of the field are told by their content and give published ids; what is saved comes back."""

import base64
import json

import pytest
import sentencepiece

from llmjax.core.errors import UserError
from llmjax.text.base import NONE, Settings
from llmjax.text.fast import Fast
from llmjax.text.folder import load_tokenizer, save
from llmjax.text.ranks import GPT2_PATTERN, Tiktoken
from llmjax.text.tokenizer import fingerprint, to_state
from tests.text.test_kinds import EVERY, RANKS, TEXTS, TRAINED, load_shared

LONG_WORD = "antidisestablishmentarianism"
# (file, kind, text, ids); the first four texts are those of OpenAI's cookbook, "How to count tokens
# with tiktoken", NeoX's is that of the Pythia model card, BERT's that of the transformers manual.
PUBLISHED = [
  ("gpt2/encoder.json", "bpe", LONG_WORD, [415, 29207, 44390, 3699, 1042]),
  ("cl100k", "tiktoken", LONG_WORD, [519, 85342, 34500, 479, 8997, 2191]),
  ("cl100k", "tiktoken", "2 + 2 = 4", [17, 489, 220, 17, 284, 220, 19]),
  ("cl100k/cl100k_base.tiktoken", "tiktoken", "hello world", [15339, 1917]),
  ("neox/20B_tokenizer.json", "bpe", "Hello, I am", [12092, 13, 309, 717]),
  ("bert", "wordpiece", "I have a new GPU!", [1045, 2031, 1037, 2047, 14246, 2226, 999]),
]
MODELS = [
  "mistral/tokenizer.model.v1",
  "mistral/mistral_instruct_tokenizer_240323.model.v3",
  "sentencepiece_tests/test_model.model",
]


@pytest.mark.parametrize(("file", "kind", "text", "ids"), PUBLISHED)
def test_published_ids(file, kind, text, ids, shared_data):
  tokenizer = load_shared(shared_data / "tokenizers" / file)
  assert tokenizer.kind == kind
  assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("file", MODELS)
def test_models_of_others_encode_and_decode_as_sentencepiece_does(file, shared_data):
  path = shared_data / "tokenizers" / file
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ours = load_shared(path)
  book = (shared_data / "tokenizers" / "sentencepiece_tests" / "botchan.txt").read_text()
  for text in (book, "", " ", "▁ Hello▁world", "  two\n\n 我想 ½", "<s> a </s><unk>[INST]"):
    ids = theirs.encode(text)
    assert ours.encode(text) == ids == ours.encode_batch([text])[0]
    assert ours.decode(ids) == theirs.decode(ids)
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)


def test_control_tokens_of_a_model_are_made_only_when_asked_for(shared_data):
  tokenizer = load_shared(shared_data / "tokenizers" / MODELS[1])
  assert tokenizer.special_tokens["[INST]"] == 3
  assert 3 not in tokenizer.encode("[INST] Hi")
  assert tokenizer.encode("<s>[INST]Hi", allow_special=True) == [1, 3, *tokenizer.encode("Hi")]


def test_smollm2_reads_its_folder(shared_data):
  folder = shared_data / "smollm2-135m"
  tokenizer = load_shared(folder)
  assert (tokenizer.kind, tokenizer.vocab_size) == ("bpe", 49_152)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)  # of config.json
  for want in json.loads((folder / "expected.json").read_text())["texts"][:2]:
    assert tokenizer.encode(want["text"]) == want["ids"]
    assert tokenizer.decode(want["ids"]) == want["text"]


# What stands around a decoder's prompt; WordPiece has BERT's own.
AROUND = {"wordpiece": [[2], [3]], "bpe": [[0], []], "bytes": [[256], []], "tiktoken": [[], []]}
AROUND |= {kind: [[1], []] for kind in ("sentencepiece", "unigram")}


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_saved_comes_back(kind, tmp_path):
  tokenizer = EVERY[kind]
  save(tokenizer, tmp_path / "new")
  again = load_tokenizer(tmp_path / "new")
  assert again.settings.affixes == AROUND[kind]
  assert fingerprint(again) == fingerprint(tokenizer)
  assert again.chat_template is None
  changed = Settings(
    bos_id=NONE,
    pad_id=tokenizer.eos_id,
    added={**tokenizer.settings.added, "<|call|>": tokenizer.vocab_size},
    chat_template="{{ 'é' }}\n",
    pattern=tokenizer.settings.pattern,
    eos_id=tokenizer.eos_id,
    affixes=[[tokenizer.eos_id, 5], [7]],
  )
  other = type(tokenizer)(tokenizer.to_bytes(), changed)
  save(other, tmp_path / "new")
  again = load_tokenizer(tmp_path / "new")
  assert (again.kind, again.settings) == (other.kind, other.settings)
  if not isinstance(other, Fast):  # what stands around a text is a part of a tokenizer.json
    assert to_state(again) == to_state(other)


@pytest.mark.parametrize("kind", EVERY)
def test_the_tokenizer_json_that_is_saved_gives_the_same_ids(kind, tmp_path):
  save(EVERY[kind], tmp_path)
  library = Fast((tmp_path / "tokenizer.json").read_bytes())
  for text in (*TEXTS, "  a\n\n b ☃ 3333 don't  ", "<|eos|><|endoftext|>"):
    ids = EVERY[kind].encode(text)
    assert library.encode(text) == ids
    assert library.decode(ids) == EVERY[kind].decode(ids)
  assert library.special_tokens == EVERY[kind].special_tokens


def test_a_word_that_is_a_token_needs_no_merges_that_lead_to_it(tmp_path):
  tokens = [*(bytes([byte]) for byte in range(256)), b"abc"]
  lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
  ranks = Tiktoken(b"".join(lines), Settings(pattern=GPT2_PATTERN, eos_id=0))
  save(ranks, tmp_path)
  library = Fast((tmp_path / "tokenizer.json").read_bytes())
  for text, ids in (("abc", [256]), ("abcd", [97, 98, 99, 100])):
    assert ranks.encode(text) == library.encode(text) == ids


def test_a_file_may_have_any_name(tmp_path):
  for kind, name in [("sentencepiece", "tokenizer.model"), ("bpe", "tokenizer.json")]:
    save(TRAINED[kind], tmp_path)
    odd = tmp_path / "sub" / kind
    odd.parent.mkdir(exist_ok=True)
    (tmp_path / name).rename(odd)
    assert fingerprint(load_tokenizer(odd)) == fingerprint(TRAINED[kind])


def write_folder(folder, **files):
  """A Hugging Face folder of our BPE with other files beside it."""
  (folder / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
  for name, value in files.items():
    (folder / f"{name}.json").write_text(json.dumps(value))
  return load_tokenizer(folder)


def test_a_folder_says_what_ends_a_text(tmp_path):
  """The files of Llama 3.1, Qwen 2.5 and Gemma 3 say it in these three ways."""
  ends = lambda **files: write_folder(tmp_path, **files).settings.ends  # noqa: E731
  assert ends() is None
  assert ends(config={"eos_token_id": [7, 8, 9]}) == [8, 9]
  assert ends(config={"text_config": {"eos_token_id": [1, 106]}}) == [106]
  assert ends(generation_config={"eos_token_id": 5}) is None  # that is EOS itself
  assert ends(tokenizer_config={"eos_token": "<|pad|>"}, config={"eos_token_id": 7}) == [5]
  with pytest.raises(UserError, match="eos_token_id 'x' is not"):
    ends(generation_config={"eos_token_id": "x"})


def test_a_folder_says_what_its_special_tokens_are(tmp_path):
  def ids(made):
    return made.bos_id, made.eos_id, made.pad_id

  assert ids(write_folder(tmp_path)) == (0, 1, 2)  # by their names
  assert ids(write_folder(tmp_path, config={"eos_token_id": 7})) == (0, 7, 2)
  generation = {"eos_token_id": [8, 9], "pad_token_id": 5}
  assert ids(write_folder(tmp_path, generation_config=generation)) == (0, 8, 5)
  assert load_tokenizer(tmp_path).settings.ends == [9]
  map_ = {"eos_token": {"content": "<|pad|>"}}
  assert ids(write_folder(tmp_path, special_tokens_map=map_)) == (0, 2, 5)
  said = {"bos_token": None, "eos_token": "<|im_end|>"}
  said["added_tokens_decoder"] = {"321": {"content": "<|im_end|>", "special": True}}
  made = write_folder(tmp_path, tokenizer_config=said)
  assert ids(made) == (None, 321, 5)
  assert made.vocab_size == 322
  assert made.encode("<|im_end|>", allow_special=True) == [321]


def test_a_folder_brings_its_chat_template(tmp_path):
  named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
  assert write_folder(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "A"
  assert write_folder(tmp_path, tokenizer_config={"chat_template": "C"}).chat_template == "C"
  (tmp_path / "chat_template.jinja").write_text("D")
  assert load_tokenizer(tmp_path).chat_template == "D"


def test_gpt2_layouts_of_other_makers_are_refused(tmp_path):
  (tmp_path / "vocab.json").write_text('{"a": 0}')
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
  with pytest.raises(UserError, match="CLIPTokenizer is not known; give"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "why"),
  [
    ("tokenizer.json", b"{", "not a tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer.json"),
    ("tokenizer.model", b"", "not a SentencePiece model"),
    ("x.tiktoken", b"IQ== 0\nIg== 1\n", "lacks 254 of the 256 bytes"),
    ("x.tiktoken", b"IQ== 0\nIg==\n", "not a tiktoken rank file"),
    ("vocab.json", b"{}", "No such file"),
    ("vocab.txt", b"a\n\xff\n", "not a SentencePiece model"),
  ],
)
def test_broken_files_are_user_errors_that_name_them(name, content, why, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=f"{name}.*{why}") as caught:
    load_tokenizer(tmp_path)
  assert "\n" not in str(caught.value)


def test_broken_files_beside_a_tokenizer_are_user_errors(tmp_path):
  for content in ("{", "[1]", '{"added_tokens_decoder": {"x": 1}}'):
    (tmp_path / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
      load_tokenizer(tmp_path)


def test_ranks_of_unknown_length_want_a_pattern(tmp_path):
  (tmp_path / "own.tiktoken").write_bytes(RANKS.to_bytes())
  with pytest.raises(UserError, match=r"317 tokens is none of the known .* as a pattern"):
    load_tokenizer(tmp_path)
