"""What all tokenizers share: special tokens, which ids mark beginnings and ends, decoding.

A kind brings three methods (`_encode`, `_encode_batch`, `_decode`) that know ordinary text alone.
Text that looks like a special token stays ordinary text unless the caller asks otherwise.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from llmjax.core.errors import UserError

NONE = -1  # in Settings: there is no such token, whatever the model file says


@dataclasses.dataclass(frozen=True)
class Settings:
  """What goes with a model file without being in it; None leaves it to the file.

  Attributes:
    bos_id: begins a document; -1 where there is none.
    eos_id: ends one; likewise.
    pad_id: fills rows up; likewise.
    added: special tokens that the model file does not hold, text → id.
    chat_template: Jinja source that turns messages into text.
    pattern: regular expression that cuts text before tiktoken's ranks are applied.
    add_bos: whether a prompt begins with BOS; None: it does where there is one.
  """

  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  added: Mapping[str, int] = dataclasses.field(default_factory=dict)
  chat_template: str | None = None
  pattern: str | None = None
  add_bos: bool | None = None

  def to_dict(self) -> dict:
    """What is set, as a JSON value."""
    pairs = dataclasses.asdict(self).items()
    return {key: value for key, value in pairs if value is not None and value != {}}


PLAIN = Settings()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What a model file says of its ids.

  Attributes:
    size: ids run from 0 to size - 1.
    special: text → id of the tokens that stand for no text.
    bos_id: begins a document, or None.
    eos_id: ends one, or None.
    pad_id: fills rows up, or None.
    unk_id: stands for what the vocabulary lacks, or None.
  """

  size: int
  special: Mapping[str, int]
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  unk_id: int | None = None


class Base:
  """A tokenizer of any kind; `Tokenizer` in `llmjax/text/tokenizer.py` says what it offers.

  Args:
    model: the trained model, enough to rebuild it.
    settings: what the caller knows beside it.
    vocabulary: what the model says of its ids.
  Raises:
    UserError: BOS, EOS or PAD lies outside the vocabulary.
  """

  kind = ""

  def __init__(self, model: bytes, settings: Settings, vocabulary: Vocabulary):
    self._model = model
    added = {t: i for t, i in settings.added.items() if vocabulary.special.get(t) != i}
    self.special_tokens = {**vocabulary.special, **added}
    self.vocab_size = max(vocabulary.size, 1 + max(added.values(), default=-1))
    self.bos_id = self._choose("BOS", settings.bos_id, vocabulary.bos_id)
    self.eos_id = self._choose("EOS", settings.eos_id, vocabulary.eos_id)
    self.pad_id = self._choose("PAD", settings.pad_id, vocabulary.pad_id)
    # What only repeats the file is left out, so that equal tokenizers have equal fingerprints.
    self.settings = dataclasses.replace(
      settings,
      bos_id=_unlike(self.bos_id, vocabulary.bos_id),
      eos_id=_unlike(self.eos_id, vocabulary.eos_id),
      pad_id=_unlike(self.pad_id, vocabulary.pad_id),
      added=added,
    )
    self.unk_id = vocabulary.unk_id
    self._no_text = frozenset(self.special_tokens.values())
    longest_first = sorted(self.special_tokens, key=len, reverse=True)
    self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

  def _choose(self, name: str, wanted: int | None, found: int | None) -> int | None:
    chosen = found if wanted is None else wanted
    if chosen is None or chosen == NONE:
      return None
    if not 0 <= chosen < self.vocab_size:
      raise UserError(f"{name} is id {chosen}, the tokenizer's run from 0 to {self.vocab_size - 1}")
    return chosen

  @property
  def chat_template(self) -> str | None:
    """Jinja source that turns messages into text, or None."""
    return self.settings.chat_template

  def find(self, token: str) -> int | None:
    """The id of a token by its own name, as a model file spells it; None where there is none."""
    return self.special_tokens.get(token)

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    """Turns text into ids, with neither BOS nor EOS.

    Args:
      text: what to encode.
      allow_special: special tokens written out in the text become their ids; only for text whose
        special tokens are your own, as a rendered chat template.
    """
    if not (allow_special and self.special_tokens):
      return self._encode(text)
    ids = []
    for number, part in enumerate(self._special.split(text)):
      if number % 2:
        ids.append(self.special_tokens[part])
      elif part:
        ids += self._encode(part)
    return ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    return self._encode_batch(texts)

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids back into text.

    Special tokens and ids outside the vocabulary vanish, broken UTF-8 becomes U+FFFD.
    """
    size, no_text = self.vocab_size, self._no_text
    return self._decode([i for i in map(int, ids) if 0 <= i < size and i not in no_text])

  def to_bytes(self) -> bytes:
    """The trained model; with `settings` enough to rebuild this tokenizer."""
    return self._model


def _unlike(chosen: int | None, found: int | None) -> int | None:
  """The setting that makes `chosen` of what the file says."""
  if chosen == found:
    return None
  return NONE if chosen is None else chosen


def too_large(vocab_size: int, most: int) -> UserError:
  """The error of a vocabulary that the training text cannot fill."""
  return UserError(
    f"tokenizer.vocab_size {vocab_size} is more than this text supports: at most {most}"
  )
