"""The tokenizer interface, and the one place that knows which kinds there are.

A tokenizer's whole state is (kind, bytes): that pair is what a workdir and a checkpoint keep, and
its hash is what tokenized data is keyed by.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Protocol

from llmjax.core.errors import UserError, nearest
from llmjax.text.sentencepiece import SentencePiece


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer a run trains, or reads from a file.

  Attributes:
    kind: `sentencepiece` (BPE with byte fallback, exact round trip).
    vocab_size: tokens, counting the 256 bytes and the special ones.
    path: a trained `tokenizer.model` to use as it is; empty trains one on the run's text.
    train_bytes: at most so much of the training text is looked at, evenly spread.
  """

  kind: str = "sentencepiece"
  vocab_size: int = 4096
  path: str = ""
  train_bytes: int = 50_000_000


class Tokenizer(Protocol):
  """What every kind offers."""

  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Turns text into ids, with neither BOS nor EOS."""

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Encodes many texts, on all cores."""

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids back into text; special tokens vanish, broken UTF-8 becomes U+FFFD."""

  def to_bytes(self) -> bytes:
    """The trained model, enough to rebuild this tokenizer."""


KINDS = {"sentencepiece": SentencePiece}


def _kind(name: str):
  if name not in KINDS:
    raise UserError(f"unknown tokenizer kind {name!r}; {nearest(name, KINDS)}")
  return KINDS[name]


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
  """Trains (or, given `config.path`, reads) the tokenizer a config asks for.

  Raises:
    UserError: unknown kind, no such file, or more vocabulary than the text supports.
  """
  kind = _kind(config.kind)
  if config.path:
    try:
      with open(config.path, "rb") as file:
        return kind(file.read())
    except OSError as error:
      raise UserError(f"tokenizer file {config.path!r}: {error.strerror}") from error
  return kind.train(texts, config.vocab_size)


def to_state(tokenizer: Tokenizer) -> dict:
  """Packs a tokenizer into a JSON value."""
  return {
    "kind": tokenizer.kind,
    "model": base64.b64encode(tokenizer.to_bytes()).decode(),
    "fingerprint": fingerprint(tokenizer),
  }


def from_state(state: dict) -> Tokenizer:
  """Unpacks what `to_state` packed."""
  return _kind(state["kind"])(base64.b64decode(state["model"]))


def fingerprint(tokenizer: Tokenizer) -> str:
  """Hashes a tokenizer's kind and model: 16 hex digits."""
  return hashlib.sha256(tokenizer.kind.encode() + tokenizer.to_bytes()).hexdigest()[:16]
