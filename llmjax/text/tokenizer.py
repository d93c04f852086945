"""Which tokenizer a run has: the one place that knows which kinds there are.

A tokenizer's whole state is (kind, bytes) and the few settings that its model file does not hold:
that is what a workdir and a checkpoint keep, and its hash is what tokenized data is keyed by.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

from llmjax.core.choices import check_least
from llmjax.core.errors import UserError, nearest
from llmjax.text.base import Settings, Tokenizer, ends
from llmjax.text.fast import ByteBPE, Fast, WordPiece
from llmjax.text.folder import load_tokenizer
from llmjax.text.ranks import Tiktoken
from llmjax.text.raw import Bytes
from llmjax.text.sentencepiece import SentencePiece, Unigram

KINDS = {
  made.kind: made for made in (SentencePiece, Unigram, ByteBPE, WordPiece, Bytes, Tiktoken, Fast)
}
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
      may be 0, the default, or the size that there is.
    path: a tokenizer file, or a folder with one, to use as it is; empty trains one on the run's
      text.
    train_bytes: at most so much of the training text is looked at, evenly spread.
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
    check_least("tokenizer", self, train_bytes=1, vocab_size=1 if trained else 0)
    if not self.path and kind is not Bytes and not hasattr(kind, "train"):
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
    made = type(read)(read.to_bytes(), dataclasses.replace(read.settings, around=None))
  elif config.kind == "bytes":
    made, where = Bytes(), "of raw bytes"
  else:
    return _kind(config.kind).train(texts, config.vocab_size)
  if made.kind != config.kind:
    raise UserError(
      f"the tokenizer {where} is of kind {made.kind!r}; tokenizer.kind says {config.kind!r}"
    )
  if config.vocab_size not in (0, _VOCAB_SIZE, made.vocab_size):
    raise UserError(
      f"the tokenizer {where} has {made.vocab_size} tokens; tokenizer.vocab_size says "
      f"{config.vocab_size}, set it to 0"
    )
  return made


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
  """Puts around a text's ids what a model was trained to see there.

  That is what the tokenizer's files say. Of one that was trained here they say nothing; texts then
  begin and end as the training documents of the model's kind do: a decoder is to go on, so it sees
  no end, and a source of an encoder_decoder has no beginning.

  Args:
    kind: of the model that reads the ids.
  Returns:
    At least one id: where nothing stands around no text, the `start_id`.
  Raises:
    UserError: a decoder's prompt, or no text, and the tokenizer has neither BOS nor EOS.
  """
  before, after = around(tokenizer, kind)
  return [*before, *ids, *after] or [start_id(tokenizer)]


def around(tokenizer: Tokenizer, kind: str) -> Sequence[Sequence[int]]:
  """The ids before and after a text, as `framed` puts them."""
  if tokenizer.settings.around is not None:
    return tokenizer.settings.around
  if kind == "decoder":
    return [[start_id(tokenizer)], []]
  return ends(tokenizer.bos_id if kind == "encoder" else None, tokenizer.eos_id)


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
    "kind": tokenizer.kind,
    "model": base64.b64encode(tokenizer.to_bytes()).decode(),
    "fingerprint": fingerprint(tokenizer),
    "settings": tokenizer.settings.to_dict(),
  }


def from_state(state: dict) -> Tokenizer:
  """Unpacks what `to_state` packed."""
  settings = dict(state.get("settings", {}))
  if settings.pop("add_bos", None) is False:  # the spelling of older checkpoints
    settings["around"] = [[], []]
  return _kind(state["kind"])(base64.b64decode(state["model"]), Settings(**settings))


def fingerprint(tokenizer: Tokenizer) -> str:
  """Hashes all that decides a text's ids (what is put around it does not): 16 hex digits."""
  decide = ("bos_id", "eos_id", "pad_id", "added", "pattern")
  settings = {k: v for k, v in tokenizer.settings.to_dict().items() if k in decide}
  written = json.dumps(settings, sort_keys=True).encode() if settings else b""
  made = hashlib.sha256(tokenizer.kind.encode() + tokenizer.to_bytes() + written)
  return made.hexdigest()[:16]
