"""What all kinds promise: text comes back, batches are their texts, training repeats itself.

The tiktoken here has the ranks that our byte-level BPE was trained to, so the two libraries check
each other.
"""

import base64
import functools
import json
import random

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from llmjax.core.errors import UserError
from llmjax.text.base import NONE, Settings
from llmjax.text.export import byte_letters
from llmjax.text.fast import ByteBPE, WordPiece
from llmjax.text.folder import load_tokenizer
from llmjax.text.ranks import GPT2_PATTERN, Tiktoken
from llmjax.text.raw import Bytes
from llmjax.text.sentencepiece import SentencePiece, Unigram
from llmjax.text.tokenizer import fingerprint, frame, from_state, start_id, to_state

ONSETS = ("qu", "br", "fl", "th", "st", "sh", "tr", "gr")
TEXTS = [
  "def main():\n    return 'héllo wörld'\n" * 30,
  "the quick brown fox jumps over the lazy dog, 1 2 3 and 44\n" * 30,
  "".join(f"{a}{b}er {b}own and {a}ick\n" for a in ONSETS for b in ONSETS),
]
TRAINED = {
  "sentencepiece": SentencePiece.train(TEXTS, 320),
  "unigram": Unigram.train(TEXTS, 320),
  "bpe": ByteBPE.train(TEXTS, 320),
  "wordpiece": WordPiece.train(TEXTS, 120),
}


def rank_file(trained: ByteBPE) -> bytes:
  """Turns the vocabulary of a byte-level BPE, less its three special tokens, into ranks."""
  byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
  vocabulary = json.loads(trained.to_bytes())["model"]["vocab"]
  lines = []
  for token, i in sorted(vocabulary.items(), key=lambda pair: pair[1]):
    if i >= 3:
      spelled = bytes(byte_of[letter] for letter in token)
      lines.append(base64.b64encode(spelled) + b" %d\n" % (i - 3))
  return b"".join(lines)


RANKS = Tiktoken(
  rank_file(TRAINED["bpe"]),
  Settings(pattern=GPT2_PATTERN, added={"<|endoftext|>": 317}, eos_id=317),
)
load_shared = functools.cache(load_tokenizer)  # large files, which several tests read
EVERY = {**TRAINED, "bytes": Bytes(), "tiktoken": RANKS}
EXACT = ["sentencepiece", "unigram", "bpe", "bytes", "tiktoken"]

# Surrogates are no text (UTF-8 cannot hold them) and sources refuse NUL.
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
# Half of all characters from a few that matter; st.text would flatten the two into one alphabet.
one = st.one_of(characters, st.sampled_from("▁ \n\taeé<>|0x'1"))
texts = st.lists(one, max_size=60).map("".join)
every = pytest.mark.parametrize("kind", EVERY)


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None, max_examples=80)
@example("")
@example("▁ ▁▁ \u2581 x▁")
@example("  leading, trailing  ")
@example("\r\n\t\x0b\x0c\x1f\x7f\x85\u2028\u2029\ufffd\ufeff\u200b\uffff")
@example("<s></s><unk><0x41><|bos|><|eos|><|endoftext|>[CLS]")
@example("e\u0301 é ﬁ Ⅳ 👩‍👩‍👧 \U0010ffff I'm we'Ll don't 3333 ½")
@given(texts)
def test_decoding_undoes_encoding(kind, text):
  assert EVERY[kind].decode(EVERY[kind].encode(text)) == text


@every
@settings(deadline=None, max_examples=40)
@example(["no mark", "▁ one", "", "a▁b▁▁ <|eos|>"])
@given(st.lists(texts, max_size=6))
def test_a_batch_is_encoded_as_its_texts_are(kind, batch):
  assert EVERY[kind].encode_batch(batch) == [EVERY[kind].encode(text) for text in batch]


@every
@settings(deadline=None, max_examples=40)
@given(ids=st.lists(st.integers(-3, 400), max_size=30))
def test_any_ids_decode(kind, ids):
  assert isinstance(EVERY[kind].decode(ids), str)


@every
@settings(deadline=None, max_examples=30)
@given(text=texts)
def test_text_becomes_ids_of_the_vocabulary_and_none_that_are_special(kind, text):
  tokenizer = EVERY[kind]
  for token in tokenizer.special_tokens:
    ids = tokenizer.encode(f"{text}{token}{text}")
    named = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    assert not named & set(ids), token
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@every
def test_special_tokens_are_read_where_that_is_asked_for(kind):
  tokenizer = EVERY[kind]
  for token, i in tokenizer.special_tokens.items():
    both = tokenizer.encode(f"the fox{token}dog", allow_special=True)
    assert both == [*tokenizer.encode("the fox"), i, *tokenizer.encode("dog")], token
    assert tokenizer.decode([*tokenizer.encode("the fox"), i]) == "the fox"
    assert tokenizer.find(token) == i


@pytest.mark.parametrize("kind", TRAINED)
def test_training_is_repeatable(kind):
  again = type(TRAINED[kind]).train(iter(TEXTS), TRAINED[kind].vocab_size)
  assert again.to_bytes() == TRAINED[kind].to_bytes()


@pytest.mark.parametrize("kind", TRAINED)
def test_training_learns_words(kind):
  text = "the quick brown fox"
  assert len(TRAINED[kind].encode(text)) < len(text) - 4


LETTERS = "".join(random.Random(0).choices("abcdefgh", k=20_000))


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("text", [LETTERS, "a" * 20_000, " " * 20_000, "\n" * 20_000, "中" * 9_000])
def test_long_text_without_spaces_comes_back(kind, text):
  assert EVERY[kind].decode(EVERY[kind].encode(text)) == text


def test_a_byte_level_bpe_is_trained_on_pieces_of_words_that_are_too_long():
  # As one word of 200 kB this takes minutes, since time grows with the square of a word's length.
  text = LETTERS * 10
  whole = ByteBPE.train([text], 400)
  cut = ByteBPE.train([text[start : start + 256] for start in range(0, len(text), 256)], 400)
  assert whole.to_bytes() == cut.to_bytes()
  assert whole.decode(whole.encode(LETTERS)) == LETTERS


def test_a_wordpiece_is_trained_without_the_words_that_it_calls_unknown():
  plain = WordPiece.train(TEXTS, 120)
  for length, same in ((100, False), (101, True)):
    word = ("the" * 40)[:length]
    trained = WordPiece.train([*TEXTS, f"{word} " * 50], 120)
    assert (trained.to_bytes() == plain.to_bytes()) == same
    assert (trained.encode(word) == [trained.unk_id]) == same


@pytest.mark.parametrize("kind", TRAINED)
def test_vocabularies_that_cannot_be_are_user_errors_that_name_what_can(kind):
  made = type(TRAINED[kind])
  with pytest.raises(UserError, match=r"vocab_size 100000 is more .* at most (\d+)") as caught:
    made.train(TEXTS, 100_000)
  most = int(str(caught.value).rsplit(" ", 1)[-1])
  assert made.train(TEXTS, most).vocab_size == most
  with pytest.raises(UserError, match=r"vocab_size 20 is too small.* need \d+"):
    made.train(TEXTS, 20)


@every
def test_a_state_makes_the_same_tokenizer(kind):
  tokenizer = EVERY[kind]
  state = json.loads(json.dumps(to_state(tokenizer)))
  again = from_state(state)
  assert type(again) is type(tokenizer)
  assert again.encode("the wörld") == tokenizer.encode("the wörld")
  assert fingerprint(again) == state["fingerprint"] == fingerprint(tokenizer)
  assert (again.bos_id, again.eos_id, again.pad_id, again.special_tokens) == (
    tokenizer.bos_id,
    tokenizer.eos_id,
    tokenizer.pad_id,
    tokenizer.special_tokens,
  )


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bytes"])
def test_settings_survive_and_only_those_that_decide_ids_change_the_fingerprint(kind):
  plain = EVERY[kind]
  talks = type(plain)(plain.to_bytes(), Settings(chat_template="{{ 1 }}"))
  assert fingerprint(talks) == fingerprint(plain)
  assert from_state(to_state(talks)).chat_template == "{{ 1 }}" and plain.chat_template is None
  added = {"<|call|>": plain.vocab_size + 1}
  other = type(plain)(plain.to_bytes(), Settings(bos_id=NONE, pad_id=0, added=added))
  again = from_state(to_state(other))
  assert (again.bos_id, again.pad_id, again.vocab_size) == (None, 0, plain.vocab_size + 2)
  assert again.encode("a<|call|>", allow_special=True)[-1] == plain.vocab_size + 1
  assert fingerprint(again) == fingerprint(other) != fingerprint(plain)


def test_a_document_is_framed_by_bos_and_eos_or_by_eos_alone():
  assert frame(EVERY["bytes"]) == (256, 257)
  assert frame(RANKS) == (317, 317)
  endless = Bytes(b"", Settings(eos_id=NONE))
  assert start_id(endless) == 256
  with pytest.raises(UserError, match="no EOS"):
    frame(endless)
  with pytest.raises(UserError, match="neither BOS nor EOS"):
    start_id(Bytes(b"", Settings(bos_id=NONE, eos_id=NONE)))


def test_an_id_outside_the_vocabulary_is_a_user_error():
  with pytest.raises(UserError, match="EOS is id 900, the tokenizer's run from 0 to 258"):
    Bytes(b"", Settings(eos_id=900))


@settings(deadline=None, max_examples=80)
@given(texts)
def test_ranks_and_merges_of_one_vocabulary_give_the_same_tokens(text):
  assert RANKS.encode(text) == [i - 3 for i in TRAINED["bpe"].encode(text)]


def test_bytes_are_their_own_ids():
  assert Bytes().encode("aé") == [97, 0xC3, 0xA9]
  assert Bytes().decode([256, 97, 0xC3, 258]) == "a\ufffd"


def test_wordpiece_drops_case_accents_and_spacing():
  tokenizer = TRAINED["wordpiece"]
  assert tokenizer.decode(tokenizer.encode("The  Quick\nFÓX")) == "the quick fox"
  assert tokenizer.encode("☃") == [tokenizer.unk_id]
