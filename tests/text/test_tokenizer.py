"""SentencePiece's own ways, tokenizers out of files, and mistakes that are user errors."""

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.sentencepiece import SentencePiece
from llmjax.text.tokenizer import TokenizerConfig, from_state, train_tokenizer
from tests.text.test_kinds import TEXTS, TRAINED

TOKENIZER = TRAINED["sentencepiece"]


def test_a_model_of_others_is_left_its_own_way_with_the_space_mark():
  spec = proto.ModelProto.FromString(TOKENIZER.to_bytes())
  spec.trainer_spec.max_sentence_length = 4192  # SentencePiece's default; else as ours (Gemma's)
  other = SentencePiece(spec.SerializeToString())
  assert other.encode("a▁b") == other.encode("a b") == TOKENIZER.encode("a b")
  assert TOKENIZER.encode("a▁b") != TOKENIZER.encode("a b")


def test_half_a_character_decodes_to_the_replacement_character():
  ids = TOKENIZER.encode("☃")  # not in the training text: three byte tokens
  assert len(ids) == 3
  assert "\ufffd" in TOKENIZER.decode(ids[:2])


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
