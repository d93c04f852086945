"""SentencePiece, BPE and unigram. Models trained here lose nothing: no normalisation, no dummy
prefix, and a U+2581 in the text, which is SentencePiece's space, is encoded as its three bytes."""

import io
import re
from collections.abc import Iterable

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.base import PLAIN, Settings, Tokenizer, too_large, too_small

_SPACE_MARK = "▁"
_SENTENCE_CHARS = 4000
_SENTENCE_BYTES = 4 * _SENTENCE_CHARS + 1  # also what tells a model of ours from others


class SentencePiece(Tokenizer):
  """A SentencePiece BPE model, a serialized `ModelProto`.

  Attributes:
    spec: pieces, scores and normalisation; not to be changed.
  Raises:
    UserError: the bytes are not a SentencePiece model.
  """

  kind = "sentencepiece"
  adds = (True, False)
  model_type = "bpe"
  # BPE pieces may span words, so indentation and common phrases are one token. Unigram's search
  # over all such pieces takes three times as long and shortens text by 3 % only.
  split_by_whitespace = False

  def __init__(self, model: bytes, settings: Settings = PLAIN):
    if not model:  # the library takes nothing for a tokenizer of no tokens
      raise UserError("the file is not a SentencePiece model: it is empty")
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.spec = proto.ModelProto.FromString(model)
    except (RuntimeError, DecodeError) as error:
      raise UserError("the file is not a SentencePiece model") from error
    self._lossless = self.spec.trainer_spec.max_sentence_length == _SENTENCE_BYTES
    sp, size = self._processor, self._processor.vocab_size()
    special = {sp.id_to_piece(i): i for i in range(size) if sp.is_control(i)}
    ids = [None if i < 0 else i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id())]
    super().__init__(model, settings, size, special, sp.unk_id(), ids)

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePiece":
    """Trains `vocab_size` tokens, counting 256 bytes and 3 special ones.

    Raises:
      UserError: the text supports fewer tokens than asked for, or the bytes alone need more.
    """
    written, length = io.BytesIO(), _SENTENCE_CHARS
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
          text[start : start + length] for text in texts for start in range(0, len(text), length)
        ),
        model_writer=written,
        model_type=cls.model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=cls.split_by_whitespace,
        max_sentence_length=_SENTENCE_BYTES,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
      )
    except RuntimeError as error:
      raise _explain(str(error), vocab_size) from error
    return cls(written.getvalue())

  def find(self, token: str) -> int | None:
    i = self._processor.piece_to_id(token)
    return super().find(token) if i == self.unk_id else i

  def spell(self, i: int) -> str:
    return self.special_names.get(i) or self._processor.id_to_piece(i)

  def _encode(self, text: str) -> list[int]:
    if not (self._lossless and _SPACE_MARK in text):
      return self._processor.encode(text)
    mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    first, *rest = map(self._processor.encode, text.split(_SPACE_MARK))
    return first + [i for ids in rest for i in (*mark, *ids)]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    pairs = zip(texts, self._processor.encode(texts, num_threads=-1), strict=True)
    return [self._encode(text) if _SPACE_MARK in text else ids for text, ids in pairs]

  def _decode(self, ids: list[int]) -> str:
    size = self._processor.vocab_size()
    return self._processor.decode([i for i in ids if i < size])


class Unigram(SentencePiece):
  """A SentencePiece unigram model; arguments and errors are those of `SentencePiece`."""

  kind = "unigram"
  adds = (True, True)
  model_type = "unigram"
  split_by_whitespace = True


def kind_of(model: bytes) -> type[SentencePiece]:
  """Tells the class of a serialized `ModelProto`.

  Raises:
    UserError: no SentencePiece model, or one of words or characters.
  """
  number = SentencePiece(model).spec.trainer_spec.model_type
  name = proto.TrainerSpec.ModelType.Name(number).lower()
  kinds = {"bpe": SentencePiece, "unigram": Unigram}
  if name not in kinds:
    raise UserError(f"the SentencePiece model is of type {name}; bpe and unigram are known")
  return kinds[name]


def _explain(message: str, vocab_size: int) -> UserError:
  most = re.search(r"value <= (\d+)", message)
  if most:
    return too_large(vocab_size, int(most[1]))
  needs = re.search(r"required_chars\. (\d+) vs (\d+)", message)
  if needs or re.search(r"vocab_size\(?\)? ?is too small|smaller than required_chars", message):
    parts = "256 bytes, 3 special tokens and the text's own characters"
    return too_small(vocab_size, parts, needs[2] if needs else "more")
  message = " ".join(message.split())
  return UserError(f"training a tokenizer of {vocab_size} tokens failed: {message}")
