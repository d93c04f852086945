"""Proves that any text comes back from its tokens exactly, and that mistakes are user errors."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.sentencepiece import SentencePiece
from llmjax.text.tokenizer import (
  TokenizerConfig,
  fingerprint,
  from_state,
  to_state,
  train_tokenizer,
)

TEXTS = [
  "def main():\n    return 'héllo wörld'\n" * 30,
  "the quick brown fox jumps over the lazy dog\n" * 30,
]
TOKENIZER = SentencePiece.train(TEXTS, 320)

# Surrogates are no text (UTF-8 cannot hold them) and sources refuse NUL.
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
# Half of all characters from a few that matter; st.text would flatten the two into one alphabet.
one = st.one_of(characters, st.sampled_from("▁ \n\taeé<>0x"))
texts = st.lists(one, max_size=60).map("".join)


@settings(deadline=None, max_examples=300)
@example("")
@example("▁")
@example(" ▁▁ \u2581 x▁")
@example("  leading, trailing  ")
@example("\r\n\t\x0b\x0c\x1f\x7f\x85\u2028\u2029")
@example("<s></s><unk><0x41>")
@example("\ufffd\ufeff\u200b\uffff")
@example("e\u0301 é ﬁ Ⅳ 👩‍👩‍👧 \U0010ffff")
@given(texts)
def test_decoding_undoes_encoding(text):
  assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=60)
@example(["no mark", "▁ one", "a▁b▁▁"])
@given(st.lists(texts, max_size=8))
def test_a_batch_is_encoded_as_its_texts_are(batch):
  assert TOKENIZER.encode_batch(batch) == [TOKENIZER.encode(text) for text in batch]


@settings(deadline=None, max_examples=60)
@given(texts)
def test_text_never_becomes_a_special_token(text):
  ids = TOKENIZER.encode(text)
  assert not {TOKENIZER.bos_id, TOKENIZER.eos_id, 0} & set(ids)
  assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


def test_a_model_of_others_is_left_its_own_way_with_the_space_mark():
  spec = proto.ModelProto.FromString(TOKENIZER.to_bytes())
  spec.trainer_spec.max_sentence_length = 4192  # SentencePiece's default; else as ours (Gemma's)
  other = SentencePiece(spec.SerializeToString())
  assert other.encode("a▁b") == other.encode("a b") == TOKENIZER.encode("a b")
  assert TOKENIZER.encode("a▁b") != TOKENIZER.encode("a b")


def test_special_tokens_vanish_in_decoding():
  ids = [TOKENIZER.bos_id, *TOKENIZER.encode("the fox"), TOKENIZER.eos_id]
  assert TOKENIZER.decode(ids) == "the fox"


def test_half_a_character_decodes_to_the_replacement_character():
  ids = TOKENIZER.encode("☃")  # not in the training text: three byte tokens
  assert len(ids) == 3
  assert "\ufffd" in TOKENIZER.decode(ids[:2])


def test_training_makes_the_asked_for_vocabulary_and_learns_words():
  assert TOKENIZER.vocab_size == 320
  # 320 - 259 tokens are pieces, enough for words of this text to cost less than their letters.
  assert len(TOKENIZER.encode("the quick brown fox")) < len("the quick brown fox") - 4


def test_training_is_repeatable():
  assert SentencePiece.train(TEXTS, 320).to_bytes() == TOKENIZER.to_bytes()


def test_a_state_makes_the_same_tokenizer():
  state = to_state(TOKENIZER)
  again = from_state(state)
  assert again.to_bytes() == TOKENIZER.to_bytes()
  assert again.encode("the wörld") == TOKENIZER.encode("the wörld")
  assert fingerprint(again) == state["fingerprint"] == fingerprint(TOKENIZER)
  assert fingerprint(SentencePiece.train(TEXTS, 321)) != state["fingerprint"]


def test_a_file_is_read_as_it_is(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(TOKENIZER.to_bytes())
  for vocab_size in (0, 320, 4096):  # whatever it is, said, left out
    read = train_tokenizer(TokenizerConfig(path=str(path), vocab_size=vocab_size), [])
    assert read.to_bytes() == TOKENIZER.to_bytes()


def test_keys_that_contradict_a_file_are_user_errors(tmp_path):
  path = str(tmp_path / "tokenizer.model")
  (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.to_bytes())
  with pytest.raises(UserError, match=r"has 320 tokens; tokenizer.vocab_size says 999"):
    train_tokenizer(TokenizerConfig(path=path, vocab_size=999), [])
  with pytest.raises(UserError, match=r"is of kind 'sentencepiece'; tokenizer.kind says 'bpe'"):
    train_tokenizer(TokenizerConfig(path=path, kind="bpe"), [])
  with pytest.raises(UserError, match=r"train_bytes changes nothing beside tokenizer.path"):
    TokenizerConfig(path=path, train_bytes=100)
  with pytest.raises(UserError, match=r"'tiktoken' is read, not trained: set tokenizer.path"):
    TokenizerConfig(kind="tiktoken")
  with pytest.raises(UserError, match=r"has 259 tokens; tokenizer.vocab_size says 300"):
    train_tokenizer(TokenizerConfig(kind="bytes", vocab_size=300), [])
  assert train_tokenizer(TokenizerConfig(kind="bytes"), []).vocab_size == 259


def test_an_unknown_kind_is_a_user_error_that_names_the_nearest():
  with pytest.raises(UserError, match=r"'sentencepeace'; did you mean 'sentencepiece'"):
    train_tokenizer(TokenizerConfig(kind="sentencepeace"), TEXTS)
  with pytest.raises(UserError, match=r"'wordy'"):
    from_state({"kind": "wordy", "model": ""})


def test_too_large_a_vocabulary_is_a_user_error_that_names_the_largest_possible():
  with pytest.raises(UserError, match=r"vocab_size 100000 is more .* at most (\d+)") as caught:
    train_tokenizer(TokenizerConfig(vocab_size=100_000), TEXTS)
  most = int(str(caught.value).rsplit(" ", 1)[-1])
  assert train_tokenizer(TokenizerConfig(vocab_size=most), TEXTS).vocab_size == most


def test_too_small_a_vocabulary_is_a_user_error_that_names_what_is_needed():
  with pytest.raises(UserError, match=r"vocab_size 100 is too small.* need \d+"):
    train_tokenizer(TokenizerConfig(vocab_size=100), TEXTS)


def test_no_text_to_train_on_is_a_user_error():
  with pytest.raises(UserError, match="training a tokenizer of 320 tokens failed"):
    train_tokenizer(TokenizerConfig(vocab_size=320), [])


def test_a_missing_file_is_a_user_error_that_names_it(tmp_path):
  path = str(tmp_path / "none.model")
  with pytest.raises(UserError, match=r"none.model.*No such file"):
    train_tokenizer(TokenizerConfig(path=path), TEXTS)
  with pytest.raises(UserError, match=r"holds none of tokenizer.json, tokenizer.model"):
    train_tokenizer(TokenizerConfig(path=str(tmp_path)), TEXTS)


def test_a_file_that_is_no_model_is_a_user_error(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(b"this is no model")
  with pytest.raises(UserError, match="not a SentencePiece model"):
    train_tokenizer(TokenizerConfig(path=str(path)), TEXTS)


def test_an_empty_file_is_a_user_error(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(b"")
  with pytest.raises(UserError, match="not a SentencePiece model"):
    train_tokenizer(TokenizerConfig(path=str(path)), TEXTS)
