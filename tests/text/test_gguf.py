"""GGUF vocabularies give llama.cpp's own ids for llama.cpp's own hard strings."""

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.folder import load_tokenizer
from llmjax.text.gguf import from_gguf
from llmjax.text.tokenizer import from_state, to_state
from tests.text.test_kinds import TRAINED

SPACED = {
  "tokenizer.ggml.model": "llama",
  "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"],
  "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
  "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
  "tokenizer.ggml.bos_token_id": 1,
  "tokenizer.ggml.eos_token_id": 2,
}


def read(path) -> dict:
  """The tokenizer's metadata in a GGUF file."""
  gguf = pytest.importorskip("gguf", reason="gguf is not installed")
  fields = gguf.GGUFReader(path).fields
  return {name: f.contents() for name, f in fields.items() if name.startswith("tokenizer.")}


def vectors(folder, name: str) -> list[tuple[str, list[int]]]:
  """llama.cpp's strings and ids; no BOS, CLS or SEP, and special tokens are not looked for."""
  inputs = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
  lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
  texts = inputs.split("\n__ggml_vocab_test__\n")
  ids = [[int(word) for word in line.split()] for line in lines]
  assert len(texts) == len(ids) == 47  # 46 and an empty one behind the last separator
  return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize(
  ("name", "kind"), [("gpt-2", "bpe"), ("llama-spm", "sentencepiece"), ("bert-bge", "wordpiece")]
)
def test_every_string_gives_the_expected_ids(name, kind, shared_data):
  folder = shared_data / "tokenizers" / "llamacpp_vectors"
  tokenizer = from_gguf(read(folder / f"ggml-vocab-{name}.gguf"))
  assert tokenizer.kind == kind
  for text, ids in vectors(folder, name):
    assert tokenizer.encode(text) == ids, text
    if kind != "wordpiece":
      assert tokenizer.decode(ids) == text
  again = from_state(to_state(tokenizer))
  assert again.encode("Hello world") == tokenizer.encode("Hello world")


@pytest.mark.parametrize(("name", "folder"), [("gpt-2", "gpt2"), ("bert-bge", "bert")])
def test_the_published_vocabulary_gives_the_same_ids(name, folder, shared_data):
  tokenizer = load_tokenizer(shared_data / "tokenizers" / folder)
  for text, ids in vectors(shared_data / "tokenizers" / "llamacpp_vectors", name):
    assert tokenizer.encode(text) == ids, text


def test_ids_of_bos_and_eos_and_the_template_are_those_of_the_metadata():
  made = from_gguf({**SPACED, "tokenizer.chat_template": "{{ bos_token }}"})
  assert (made.bos_id, made.eos_id, made.pad_id, made.unk_id) == (1, 2, None, 0)
  assert made.special_tokens == {"<s>": 1, "</s>": 2}
  assert made.chat_template == "{{ bos_token }}"
  without = {key: value for key, value in SPACED.items() if "bos" not in key}
  assert from_gguf(without).bos_id is None


@pytest.mark.parametrize(("prefix", "ids"), [(True, [6, 5]), (False, [7])])
def test_the_space_before_a_text_is_put_there_where_the_metadata_say_so(prefix, ids):
  made = from_gguf({**SPACED, "tokenizer.ggml.add_space_prefix": prefix})
  assert made.encode("ab") == ids
  assert made.decode(made.encode("ab")) == "ab"


def test_our_own_model_survives_the_way_through_metadata():
  ours = TRAINED["sentencepiece"]
  spec = proto.ModelProto.FromString(ours.to_bytes())
  made = from_gguf(
    {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": [piece.piece for piece in spec.pieces],
      "tokenizer.ggml.scores": [piece.score for piece in spec.pieces],
      "tokenizer.ggml.token_type": [piece.type for piece in spec.pieces],
      "tokenizer.ggml.add_space_prefix": False,
    }
  )
  for text in ("def main():\n    return 'héllo'", "  the  fox ☃\n\n"):
    assert made.encode(text) == ours.encode(text)


def test_what_is_not_known_is_a_user_error_that_names_it():
  with pytest.raises(UserError, match=r"model 'rwkv' is not known; known: bert, gpt2, llama"):
    from_gguf({"tokenizer.ggml.model": "rwkv"})
  with pytest.raises(UserError, match=r"no 'tokenizer.ggml.scores'"):
    from_gguf({key: value for key, value in SPACED.items() if "scores" not in key})
  with pytest.raises(UserError, match=r"pre-tokenizer 'qwen9' is not known; did you mean 'qwen2'"):
    from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen9"})
