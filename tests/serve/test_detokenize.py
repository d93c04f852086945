"""New text is what prompt and new tokens read together, in whole characters, cut before a stop."""

import random

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.serve.detokenize import Detokenizer
from llmjax.text.fast import ByteBPE, WordPiece
from llmjax.text.raw import Bytes
from llmjax.text.sentencepiece import SentencePiece, Unigram

TEXT = "the quick brown fox jumps over the lazy dog, naïve café 東京 🙂🙃 and  two spaces\n"
PLAIN = "the quick brown fox jumps over the lazy dog and two more"


def with_dummy_prefix(kind):
  """A model that drops the space before a text's first word, as Llama's and T5's do."""
  model = proto.ModelProto.FromString(kind.train([TEXT * 20], 296).to_bytes())
  model.normalizer_spec.add_dummy_prefix = True
  model.trainer_spec.max_sentence_length = 4192  # of nobody's but ours it is something else
  return SentencePiece(model.SerializeToString())


TOKENIZERS = {
  "sentencepiece": lambda: with_dummy_prefix(SentencePiece),
  "unigram": lambda: with_dummy_prefix(Unigram),
  "bpe": lambda: ByteBPE.train([TEXT * 20], 300),
  "bytes": Bytes,
}


def pieces_of(tokenizer, prompt, new, stop=()):
  """The pieces that come out when the new ids come one by one, and the row's text at the end."""
  row = Detokenizer(tokenizer, prompt, stop)
  pieces = []
  for i in new:
    row.add([i])
    pieces.append(row.piece())
  row.finish()
  return [*pieces, row.piece()], row


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_whole_text_without_the_prompts(name):
  tokenizer = TOKENIZERS[name]()
  ids = tokenizer.encode(TEXT * 2)
  assert tokenizer.decode(ids) == TEXT * 2
  marked = [tokenizer.bos_id, *ids[:9], tokenizer.eos_id, *ids[9:]]  # these read as nothing
  rng = random.Random(0)
  for cut in [0, 1, *rng.sample(range(2, len(marked)), 9)]:
    pieces, row = pieces_of(tokenizer, marked[:cut], marked[cut:])
    before = tokenizer.decode(marked[:cut]).rstrip("\ufffd")  # a cut may go through a character
    assert before + "".join(pieces) == TEXT * 2
    assert row.text == "".join(pieces) and row.ids == marked[cut:]
    assert "\ufffd" not in row.text


def test_the_space_before_a_word_belongs_to_the_word():
  tokenizer = with_dummy_prefix(SentencePiece)
  prompt, new = tokenizer.encode("the quick"), tokenizer.encode("brown fox")
  assert tokenizer.decode(new) == "brown fox"  # what the space was lost by
  assert "".join(pieces_of(tokenizer, prompt, new)[0]) == " brown fox"
  assert "".join(pieces_of(tokenizer, [tokenizer.bos_id], new)[0]) == "brown fox"
  pieces = WordPiece.train([PLAIN] * 20, 60)
  prompt, new = pieces.encode("the quick"), pieces.encode("brown fox")
  assert "".join(pieces_of(pieces, prompt, new)[0]) == " brown fox"


def test_a_character_comes_when_it_is_whole_or_when_the_text_ends():
  tokenizer = Bytes()
  smile = list("🙂".encode())
  assert pieces_of(tokenizer, [], [*smile, 65])[0] == ["", "", "", "🙂", "A", ""]
  assert pieces_of(tokenizer, smile[:2], [*smile[2:], 65])[0] == ["", "🙂", "A", ""]
  assert pieces_of(tokenizer, [65], smile[:3])[0] == ["", "", "", "\ufffd"]
  assert pieces_of(tokenizer, [65], [smile[0], 66])[0] == ["", "\ufffdB", ""]


@pytest.mark.parametrize(
  ("stop", "text", "ids"),
  [
    (["STOP"], "abcS", 4),
    (["STOP", "bc"], "a", 1),
    (["S"], "abc", 3),
    (["cSTOP", "TOP?"], "abcSSTOP!", 9),
    (["a"], "", 0),
  ],
)
def test_a_stop_text_is_found_across_tokens_and_never_shown(stop, text, ids):
  pieces, row = pieces_of(Bytes(), [88], list(b"abcSSTOP!"), stop)
  assert (row.text, row.ids, "".join(pieces)) == (text, list(b"abcSSTOP!")[:ids], text)
  assert row.stopped == (text != "abcSSTOP!")


def test_what_may_begin_a_stop_text_is_held_back():
  pieces, _ = pieces_of(Bytes(), [], b"aSTORY", ["STOP"])
  assert pieces == ["a", "", "", "", "STOR", "Y", ""]
  pieces, _ = pieces_of(Bytes(), [], b"aaab", ["aab"])
  assert pieces == ["", "", "a", "", ""]
  pieces, row = pieces_of(Bytes(), [], b"xST", ["STOP"])
  assert pieces == ["x", "", "", "ST"] and not row.stopped
