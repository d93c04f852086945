"""GGUF vocabularies give llama.cpp's own ids for llama.cpp's own hard strings."""

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.cutting import PATTERNS
from llmjax.text.fast import words
from llmjax.text.gguf import from_gguf
from llmjax.text.tokenizer import from_state, to_state
from tests.text.test_kinds import TRAINED, load_shared

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
  tokenizer = load_shared(shared_data / "tokenizers" / folder)
  for text, ids in vectors(shared_data / "tokenizers" / "llamacpp_vectors", name):
    assert tokenizer.encode(text) == ids, text


def test_ids_of_bos_and_eos_and_the_template_are_those_of_the_metadata():
  made = from_gguf({**SPACED, "tokenizer.chat_template": "{{ bos_token }}"})
  assert (made.bos_id, made.eos_id, made.pad_id, made.unk_id) == (1, 2, None, 0)
  assert made.special_tokens == {"<s>": 1, "</s>": 2}
  assert made.chat_template == "{{ bos_token }}"


BPE = {  # digits, and letters that no merge joins
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.tokens": ["1", "2", "3", "4", "12", "123", "1234", "a", "b", "ab", "<s>", "<e>"],
  "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
  "tokenizer.ggml.token_type": [1] * 10 + [3, 3],
}


def bpe(**keys):
  return from_gguf(BPE | {f"tokenizer.ggml.{key}": value for key, value in keys.items()})


def around(metadata: dict, **keys):
  """What stands around a text, as llama.cpp's `add_special` puts it."""
  made = from_gguf(metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()})
  return made.settings.affixes


def test_what_stands_around_a_text_where_the_metadata_do_not_say():
  silent = {key: value for key, value in SPACED.items() if not key.endswith("_id")}
  assert around(silent) == around(SPACED) == [[1], []]
  assert around(SPACED, add_bos_token=False) == [[], []]
  assert around(SPACED, add_eos_token=True) == [[1], [2]]
  ids = {"bos_token_id": 10, "eos_token_id": 11, "pre": "gpt-2"}
  assert around(BPE, **ids) == [[], []]
  assert around(BPE, **ids, add_bos_token=True) == [[10], []]
  for pre in ("llama-bpe", "falcon3", "tekken"):
    assert around(BPE, **ids | {"pre": pre}) == [[10], []]
  assert around(BPE, **ids | {"pre": "smaug-bpe"}) == [[], []]
  bert = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": [f"[{i}]" for i in range(100)] + ["[UNK]", "[CLS]", "[SEP]", "▁a"],
  }
  assert around(bert) == [[101], [102]]
  assert around(bert, seperator_token_id=7, eos_token_id=8) == [[101], [7]]
  t5 = SPACED | {"tokenizer.ggml.model": "t5"}
  t5["tokenizer.ggml.tokens"] = ["<pad>", "</s>", "<unk>", *t5["tokenizer.ggml.tokens"][3:]]
  t5["tokenizer.ggml.token_type"] = [3, 3, 2, 1, 1, 1, 1, 1]
  del t5["tokenizer.ggml.bos_token_id"], t5["tokenizer.ggml.eos_token_id"]
  assert around(t5) == [[], [1]]
  assert (from_gguf(t5).kind, from_gguf(t5).pad_id) == ("unigram", 0)
  assert bpe(pre="gpt-2").eos_id == 11  # llama.cpp's, Falcon's, if it is spelled as such
  ordinary = [*BPE["tokenizer.ggml.tokens"][:-1], "x"]
  assert bpe(pre="gpt-2", tokens=ordinary).eos_id is None
  with pytest.raises(UserError, match="have add_bos_token, but no bos_token_id"):
    bpe(pre="gpt-2", add_bos_token=True, tokens=ordinary)


# A text, and how it is cut by what the expressions of each model's `tokenizer.json` match.
CUT = "DON'T fooBar 12345 x=\n\nya"
CUTS = {
  "gpt-2": "DON|'|T| fooBar| 12345| x|=|\n|\n|ya",
  "starcoder": "DON|'|T| fooBar| |1|2|3|4|5| x|=|\n|\n|ya",
  "llama3": "DON|'T| fooBar| |123|45| x|=\n\n|ya",
  "qwen2": "DON|'T| fooBar| |1|2|3|4|5| x|=\n\n|ya",
  "gpt-4o": "DON'T| foo|Bar| |123|45| x|=\n\n|ya",
  "tekken": "DON|'T| foo|Bar| |1|2|3|4|5| x|=\n\n|ya",
  "seed-coder": "DON|'T| fooBar| |1|2|3|4|5| x|=|\n\n|ya",
  "bailingmoe": "DON|'T| fooBar| |1|2|3|4|5| x|=\n\n|ya",
  "tiny_aya": "DON'T| foo|Bar| |12|345| x|=\n\n|ya",
  "falcon": "DON|'|T| fooBar| |123|45| x|=|\n|\n|ya",
  "default": "DON|'|T| fooBar| |123|45| x|=|\n|\n|ya",
  "bloom": "DON'T| fooBar| 12345| x=|\n\n|ya",
  "viking": "DON'T| fooBar| |1|2|3|4|5| x=|\n\n|ya",
  "deepseek-coder": "DON|'|T| fooBar| |1|2|3|4|5| x|=|\n|\n|ya",
  "deepseek-v3": "DON|'T| fooBar| |123|45| x|=\n\n|ya",
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_name_says(pre):
  pieces = [piece for piece, _ in words(*PATTERNS[pre]).pre_tokenize_str(CUT)]
  plain = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces]
  assert plain == CUTS[pre].split("|")


@pytest.mark.parametrize(
  ("pre", "other"),
  [
    ("deepseek-r1-qwen", "qwen2"), ("megrez", "qwen2"), ("smaug-bpe", "llama3"),
    ("falcon3", "llama3"), ("llama-bpe", "llama3"), ("glm4", "llama3"), ("exaone4", "gpt-2"),
    ("phi-2", "gpt-2"), ("smollm", "starcoder"), ("command-r", "starcoder"), ("llama4", "gpt-4o"),
    ("hunyuan-dense", "deepseek-v3"), ("poro-chat", "bloom"), ("llada-moe", "bailingmoe"),
  ],
)
def test_names_that_stand_for_the_same_cutting(pre, other):
  assert PATTERNS[pre] is PATTERNS[other]


def test_deepseeks_letters_are_those_of_its_own_list():
  """Samples of what stands in the list that DeepSeek-LLM's `tokenizer.json` spells out, and not."""
  cut = words(PATTERNS["deepseek-llm"][1])
  for text, pieces in (("x Straße", 2), (" Ελλάς", 1), (" Приве́т", 3), ("ՀԱՅ", 1)):
    assert len(cut.pre_tokenize_str(text)) == pieces, text
  for other in ("x\u0561", "x\U0001d400", "x\u10d0", "x你", "x\u01bb"):
    assert len(cut.pre_tokenize_str(other)) == 2, other


def test_without_a_name_the_cutting_is_llama_cpps_default_and_says_so(capsys):
  assert bpe().encode("1234") == bpe(pre="default").encode("1234") == [5, 3]  # 123 4
  assert capsys.readouterr().err == (
    "llmjax: warning: the GGUF file does not say how its tokenizer cuts text ('tokenizer.ggml.pre' "
    "is missing); 'default' is taken, and ids may differ from those the model was trained on\n"
  )
  assert bpe(pre="gpt-2").encode("1234") == [6]
  assert bpe(pre="deepseek-r1-qwen").encode("1234") == [0, 1, 2, 3]
  assert capsys.readouterr().err == ""


def test_a_whole_word_is_a_token_before_anything_merges():
  assert bpe(pre="dbrx").encode("ab") == [7, 8]
  for pre in ("llama-bpe", "tekken", "lfm2"):
    assert bpe(pre=pre).encode("ab") == [9]


def test_a_vocabulary_of_unigrams_keeps_its_rules_of_normalisation(shared_data):
  """The model that SentencePiece is tested with: unigram, NFKC, no double spaces."""
  path = shared_data / "tokenizers" / "sentencepiece_tests" / "test_model.model"
  spec = proto.ModelProto.FromString(path.read_bytes())
  rules = spec.normalizer_spec
  made = from_gguf(
    {
      "tokenizer.ggml.model": "t5",
      "tokenizer.ggml.tokens": [piece.piece for piece in spec.pieces],
      "tokenizer.ggml.scores": [piece.score for piece in spec.pieces],
      "tokenizer.ggml.token_type": [piece.type for piece in spec.pieces],
      "tokenizer.ggml.precompiled_charsmap": [
        byte - 256 if byte > 127 else byte for byte in rules.precompiled_charsmap
      ],
      "tokenizer.ggml.add_space_prefix": rules.add_dummy_prefix,
      "tokenizer.ggml.remove_extra_whitespaces": rules.remove_extra_whitespaces,
      "tokenizer.ggml.eos_token_id": 2,
    }
  )
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  for text in ("I saw a girl with a telescope.", "ﬁne  ①  words ", "Ｔｅｓｔ"):
    assert made.encode(text) == theirs.encode(text), text
  assert made.encode("ﬁne  words") == made.encode("fine words")


def test_the_ends_of_a_text_are_told_by_keys_and_by_names():
  """As llama.cpp: eot and eom keys, and what a few tokens are called."""
  assert from_gguf(SPACED).settings.ends is None
  keyed = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
  assert from_gguf({**SPACED, **keyed}).settings.ends == [5]
  tokens = [*SPACED["tokenizer.ggml.tokens"][:-2], "<|im_end|>", "<end_of_turn>"]
  named = from_gguf({**SPACED, **keyed, "tokenizer.ggml.tokens": tokens})
  assert named.settings.ends == [5, 6, 7]
  assert from_state(to_state(named)).settings.ends == [5, 6, 7]


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
  with pytest.raises(UserError, match=r"pre-tokenizer 'qwen9' is not known; did you mean 'qwen"):
    bpe(pre="qwen9")
  for model in ("plamo2", "gemma4"):
    with pytest.raises(UserError, match=f"GGUF tokenizer model '{model}' is not known"):
      bpe(model=model)
  with pytest.raises(UserError, match="holds no vocabulary"):
    from_gguf({"tokenizer.ggml.model": "none"})
  with pytest.raises(UserError, match="holds a token twice"):
    bpe(pre="gpt-2", tokens=[*BPE["tokenizer.ggml.tokens"][:-1], "1"])
  with pytest.raises(UserError, match=r"gpt2 tokenizer cannot be built: .*out of vocabulary"):
    bpe(pre="gpt-2", merges=["x y"])
  with pytest.raises(UserError, match="llama tokenizer cannot be built"):
    from_gguf(SPACED | {"tokenizer.ggml.token_type": [1, 3]})


def test_keys_that_nothing_reads_are_named(capsys):
  bpe(pre="gpt-2", fim_pre_token_id=3, mask_token_id=4, token_type_count=1)
  assert capsys.readouterr().err == ""
  from_gguf(SPACED | {"tokenizer.ggml.suppress_tokens": [1], "tokenizer.rwkv.world": "x"})
  assert capsys.readouterr().err == (
    "llmjax: note: nothing reads these keys of the GGUF file: tokenizer.ggml.suppress_tokens, "
    "tokenizer.rwkv.world\n"
  )
