"""Which tokenizer a run has, what is put around its texts, and its state: (kind, bytes, settings),
which workdirs and checkpoints keep and whose hash is the key of tokenized data."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError, nearest
from llmjax.text.base import Settings, Tokenizer, bos_eos
from llmjax.text.fast import ByteBPE, Fast, WordPiece
from llmjax.text.folder import load_tokenizer
from llmjax.text.ranks import Tiktoken
from llmjax.text.raw import Bytes
from llmjax.text.sentencepiece import SentencePiece, Unigram

_CLASSES = (SentencePiece, Unigram, ByteBPE, WordPiece, Bytes, Tiktoken, Fast)
KINDS = {each.kind: each for each in _CLASSES}
_VOCAB_SIZE = 4096
_TRAIN_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer a run trains, or reads from a file.

  Attributes:
    kind: `sentencepiece` (BPE with byte fallback), `unigram` (SentencePiece's other algorithm),
      `bpe` (byte-level), `wordpiece` (BERT's, lossy) or `bytes`; read from files only: `tiktoken`
      (rank files) and `json` (any other `tokenizer.json`). With `path` it must be the file's.
    vocab_size: tokens, counting the 256 bytes and the special ones. Where nothing is trained it
      may be 0, the default, or the tokenizer's size.
    path: a tokenizer file, or a folder with one, to use as it is; empty trains one.
    train_bytes: training looks at no more of the run's text, evenly spread over it.
  Raises:
    UserError: an unknown kind, or keys that contradict each other.
  """

  kind: str = "sentencepiece"
  vocab_size: int = _VOCAB_SIZE
  path: str = ""
  train_bytes: int = _TRAIN_BYTES

  def __post_init__(self):
    kind = _kind(self.kind)
    trained = not self.path and kind is not Bytes
    check_fields("tokenizer", self, train_bytes=1, vocab_size=1 if trained else 0)
    if trained and not hasattr(kind, "train"):
      raise UserError(f"a tokenizer of kind {self.kind!r} is read, not trained: set tokenizer.path")
    if self.path and self.train_bytes != _TRAIN_BYTES:
      raise UserError("tokenizer.train_bytes changes nothing beside tokenizer.path: leave it out")


def _kind(name: str):
  if name not in KINDS:
    raise UserError(f"unknown tokenizer kind {name!r}; {nearest(name, KINDS)}")
  return KINDS[name]


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
  """Trains (or, given `config.path`, reads) the tokenizer a config asks for.

  Raises:
    UserError: no such file, one of another kind or size than the config says, or more vocabulary
      than the text supports.
  """
  if config.path:
    read, where = load_tokenizer(config.path), f"in {config.path!r}"
    # The run's documents are framed as `frame` says, so its prompts have to be.
    tokenizer = type(read)(read.to_bytes(), dataclasses.replace(read.settings, affixes=None))
  elif config.kind == "bytes":
    tokenizer, where = Bytes(), "of raw bytes"
  else:
    return _kind(config.kind).train(texts, config.vocab_size)
  if tokenizer.kind != config.kind:
    raise UserError(
      f"the tokenizer {where} is of kind {tokenizer.kind!r}; tokenizer.kind says {config.kind!r}"
    )
  if config.vocab_size not in (0, _VOCAB_SIZE, tokenizer.vocab_size):
    raise UserError(
      f"the tokenizer {where} has {tokenizer.vocab_size} tokens; tokenizer.vocab_size says "
      f"{config.vocab_size}, set it to 0"
    )
  return tokenizer


def frame(tokenizer: Tokenizer) -> tuple[int, int]:
  """The ids before and after a document: BOS and EOS.

  A tokenizer without BOS begins with EOS, as GPT-2's `<|endoftext|>` stands between documents.

  Raises:
    UserError: the tokenizer has no EOS.
  """
  if tokenizer.eos_id is None:
    raise UserError(
      f"this {tokenizer.kind} tokenizer has no EOS, so the ends of documents cannot be marked"
    )
  return start_id(tokenizer), tokenizer.eos_id


def framed(tokenizer: Tokenizer, kind: str, ids: Sequence[int]) -> list[int]:
  """Puts a text's ids between its `affixes`.

  Args:
    kind: of the model that reads the ids.
  Returns:
    At least one id: of an empty text without affixes, the `start_id`.
  Raises:
    UserError: a decoder's prompt, or no text, and the tokenizer has neither BOS nor EOS.
  """
  prefix, suffix = affixes(tokenizer, kind)
  return [*prefix, *ids, *suffix] or [start_id(tokenizer)]


def affixes(tokenizer: Tokenizer, kind: str) -> Sequence[Sequence[int]]:
  """The ids before and after a text, as the tokenizer's files say. Of one trained here they say
  nothing: texts then begin and end as the training documents of the model's kind do, a decoder's
  without an end, since it is to go on, and an encoder_decoder's source without a beginning."""
  if tokenizer.settings.affixes is not None:
    return tokenizer.settings.affixes
  if kind == "decoder":
    return [[start_id(tokenizer)], []]
  return bos_eos(tokenizer.bos_id if kind == "encoder" else None, tokenizer.eos_id)


def start_id(tokenizer: Tokenizer) -> int:
  """The id before a document or a prompt: BOS, or EOS where there is no BOS.

  Raises:
    UserError: the tokenizer has neither.
  """
  start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
  if start is None:
    raise UserError(f"this {tokenizer.kind} tokenizer has neither BOS nor EOS to begin a text with")
  return start


def to_state(tokenizer: Tokenizer) -> dict:
  """Packs a tokenizer into a JSON value."""
  return {
    "kind": tokenizer.kind, "model": base64.b64encode(tokenizer.to_bytes()).decode(),
    "fingerprint": fingerprint(tokenizer), "settings": tokenizer.settings.to_dict(),
  }


def from_state(state: dict) -> Tokenizer:
  """Unpacks what `to_state` packed."""
  settings = dict(state.get("settings", {}))
  if settings.pop("add_bos", None) is False:  # spellings of older checkpoints
    settings["affixes"] = [[], []]
  if "around" in settings:
    settings["affixes"] = settings.pop("around")
  return _kind(state["kind"])(base64.b64decode(state["model"]), Settings(**settings))


def fingerprint(tokenizer: Tokenizer) -> str:
  """Hashes all that decides a text's ids (what is put around it does not): 16 hex digits."""
  decide = ("bos_id", "eos_id", "pad_id", "added", "pattern")
  settings = {k: v for k, v in tokenizer.settings.to_dict().items() if k in decide}
  written = json.dumps(settings, sort_keys=True).encode() if settings else b""
  digest = hashlib.sha256(tokenizer.kind.encode() + tokenizer.to_bytes() + written)
  return digest.hexdigest()[:16]
