"""SentencePiece BPE with byte fallback: any text comes back exactly.

Text is left as it is (no normalisation, no dummy prefix), so that bits per byte are those of the
very bytes on disk. SentencePiece writes a space as U+2581 inside; a U+2581 in the text itself is
therefore spelled in its three bytes, which decode to what was there.
"""

import io
import re
from collections.abc import Iterable

import sentencepiece

from llmjax.core.errors import UserError

_SPACE_MARK = "▁"
_SENTENCE_CHARS = 4000


class SentencePiece:
  """A trained SentencePiece model.

  Args:
    model: serialized `ModelProto`, as in a `tokenizer.model` file.
  Raises:
    UserError: the bytes are not a SentencePiece model.
  """

  kind = "sentencepiece"

  def __init__(self, model: bytes):
    self._model = model
    if not model:  # the library takes nothing for a tokenizer of no tokens
      raise UserError("the file is not a SentencePiece model: it is empty")
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError("the file is not a SentencePiece model") from error
    self.vocab_size = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePiece":
    """Trains BPE with byte fallback; pieces may hold spaces, so indentation is one token.

    Args:
      texts: documents.
      vocab_size: tokens, counting 256 bytes and 3 special ones.
    Raises:
      UserError: the text supports fewer tokens than asked for, or the bytes alone need more.
    """
    written = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
        max_sentence_length=4 * _SENTENCE_CHARS + 1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
      )
    except RuntimeError as error:
      raise UserError(_why(str(error), vocab_size)) from error
    return cls(written.getvalue())

  def encode(self, text: str) -> list[int]:
    """Turns text into ids, with neither BOS nor EOS."""
    ids = []
    for number, part in enumerate(text.split(_SPACE_MARK)):
      if number:
        ids += [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
      ids += self._processor.encode(part)
    return ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    ids = self._processor.encode(texts, num_threads=-1)
    return [
      self.encode(text) if _SPACE_MARK in text else row
      for text, row in zip(texts, ids, strict=True)
    ]

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids back into text; special tokens vanish, broken UTF-8 becomes U+FFFD."""
    return self._processor.decode([int(i) for i in ids])

  def to_bytes(self) -> bytes:
    """The serialized `ModelProto`."""
    return self._model


def _sentences(texts: Iterable[str]):
  for text in texts:
    for start in range(0, len(text), _SENTENCE_CHARS):
      yield text[start : start + _SENTENCE_CHARS]


def _why(message: str, vocab_size: int) -> str:
  most = re.search(r"value <= (\d+)", message)
  if most:
    return (
      f"tokenizer.vocab_size {vocab_size} is more than this text supports: at most {most[1]}"
    )
  least = re.search(r"vocab_size\(?\)? ?is too small|smaller than required_chars", message)
  needs = re.search(r"required_chars\. (\d+) vs (\d+)", message)
  if least or needs:
    return (
      f"tokenizer.vocab_size {vocab_size} is too small: 256 bytes, 3 special tokens and the "
      f"text's own characters need {needs[2] if needs else 'more'}"
    )
  return f"training a tokenizer of {vocab_size} tokens failed: {' '.join(message.split())}"
