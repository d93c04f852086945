"""What all tokenizers share: special tokens, BOS, EOS and PAD, decoding. A kind adds `_encode` and
`_decode` of ordinary text; special tokens spelled out in text are ordinary unless the caller asks.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from llmjax.core.errors import UserError

NONE = -1  # in Settings: there is no such token, whatever the model file says

# Names by which models that do not say otherwise have BOS, EOS and PAD, likeliest first.
_IDS = ("bos_id", "eos_id", "pad_id")
_NAMES = (
  ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
  ("</s>", "<|eos|>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
  ("<pad>", "<|pad|>", "[PAD]", "<|padding|>"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What goes with a model file without being in it; None leaves it to the file.

  Attributes:
    bos_id: begins a document; -1 where there is none.
    eos_id: ends one; likewise.
    pad_id: fills rows up; likewise.
    added: special tokens that the model file does not hold, text → id.
    chat_template: Jinja source that turns messages into text.
    tool_template: the one for chats with tools, where there are two.
    named: special tokens by the names that templates have for them, such as `sep_token`.
    pattern: tiktoken's pre-tokenization pattern, a regular expression.
    affixes: ids put before and ids put after a single text, as the tokenizer's own files say; None:
      no file says, as for a tokenizer trained here.
    ends: stop ids of generation beside EOS.
  """

  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  added: Mapping[str, int] = dataclasses.field(default_factory=dict)
  chat_template: str | None = None
  pattern: str | None = None
  affixes: Sequence[Sequence[int]] | None = None
  ends: Sequence[int] | None = None
  tool_template: str | None = None
  named: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def to_dict(self) -> dict:
    """The fields that are set, as a JSON value."""
    pairs = dataclasses.asdict(self).items()
    return {key: value for key, value in pairs if value is not None and value != {}}


PLAIN = Settings()


def bos_eos(bos_id: int | None, eos_id: int | None) -> list[list[int]]:
  """`Settings.affixes` of a tokenizer that puts these two ids around a text, where they exist."""
  return [[] if i in (None, NONE) else [i] for i in (bos_id, eos_id)]


class Tokenizer:
  """A tokenizer of any kind; ids that do not exist are None.

  Args:
    model: the trained model, enough to rebuild it.
    settings: what the caller knows beside it.
    size: the model's ids run from 0 to size - 1.
    special: text → id of the model's tokens that stand for no text.
    unk_id: stands for what the vocabulary lacks.
    ids: BOS, EOS and PAD as the model says; by default those of `special` that bear their names.
  Attributes:
    special_tokens: text → id; `special_names` is id → text.
    bos_id: as chosen by settings or model; `eos_id`, `pad_id` and `unk_id` likewise.
  Raises:
    UserError: BOS, EOS or PAD lies outside the vocabulary.
  """

  kind = ""
  adds = (False, False)  # whether BOS and EOS are put around a text where no file says

  def __init__(
    self,
    model: bytes,
    settings: Settings,
    size: int,
    special: Mapping[str, int],
    unk_id: int | None = None,
    ids: Sequence[int | None] = (),
  ):
    self._model = model
    added = {t: i for t, i in settings.added.items() if special.get(t) != i}
    self.special_tokens = {**special, **added}
    self.vocab_size = max(size, 1 + max(added.values(), default=-1))
    self.unk_id = unk_id
    named = [next((special[name] for name in names if name in special), None) for names in _NAMES]
    self.bos_id, self.eos_id, self.pad_id = (
      self._choose(name, getattr(settings, name), found)
      for name, found in zip(_IDS, ids or named, strict=True)
    )
    # What only repeats the file is left out, so that equal tokenizers have equal fingerprints.
    same = [n for n, found in zip(_IDS, ids or named, strict=True) if getattr(self, n) == found]
    self.settings = dataclasses.replace(settings, added=added, **dict.fromkeys(same))
    self.chat_template = settings.chat_template
    self.special_names = {i: token for token, i in self.special_tokens.items()}
    longest_first = sorted(self.special_tokens, key=len, reverse=True)
    self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

  def _choose(self, name: str, wanted: int | None, found: int | None) -> int | None:
    chosen = found if wanted is None else wanted
    if chosen is None or chosen == NONE:
      return None
    if not 0 <= chosen < self.vocab_size:
      token, last = name.removesuffix("_id").upper(), self.vocab_size - 1
      raise UserError(f"{token} is id {chosen}, the tokenizer's run from 0 to {last}")
    return chosen

  def template(self) -> list[list[int]] | None:
    """The affixes that the model file itself puts around a text; None: it names none."""
    return None

  def find(self, token: str) -> int | None:
    """The id of a token by its own name, as a model file spells it; None where there is none."""
    return self.special_tokens.get(token)

  def added_tokens(self) -> dict[str, dict]:
    """The tokens that text is searched for as a whole → their flags, `special` among them."""
    return {token: {"special": True} for token in self.special_tokens}

  def spell(self, i: int) -> str:
    """A token by its id, as a model file spells it."""
    return self.special_names[i]

  def encode(self, text: str, allow_special: bool = False, cut: str = "") -> list[int]:
    """Turns text into ids, with neither BOS nor EOS.

    Args:
      allow_special: special tokens written out in the text become their ids; only for text whose
        special tokens are your own, as a rendered chat template.
      cut: stands inside what only looks like a special token; it is taken out, and what it stood
        in is text.
    """
    if not (allow_special and self.special_tokens):
      return self._encode(text.replace(cut, ""))
    ids = []
    for piece in filter(None, self._special.split(text)):
      special = self.special_tokens.get(piece)
      ids += self._encode(piece.replace(cut, "")) if special is None else [special]
    return ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    return [self._encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids back into text.

    Special tokens and ids outside the vocabulary vanish, broken UTF-8 becomes U+FFFD.
    """
    size, no_text = self.vocab_size, self.special_names
    return self._decode([i for i in map(int, ids) if 0 <= i < size and i not in no_text])

  def to_bytes(self) -> bytes:
    """The trained model; with `settings` enough to rebuild this tokenizer."""
    return self._model


def too_large(vocab_size: int, most: int) -> UserError:
  """The error of a vocabulary that the training text cannot fill."""
  return UserError(
    f"tokenizer.vocab_size {vocab_size} is more than this text supports: at most {most}"
  )


def too_small(vocab_size: int, parts: str, least: int | str) -> UserError:
  """The error of a vocabulary that has no room for what every one must hold."""
  return UserError(f"tokenizer.vocab_size {vocab_size} is too small: {parts} need {least}")
