"""Tokenizer files of other projects, told by their content: which class runs them, on which bytes.
Bare vocabularies become a `tokenizer.json`; pieces that their maker's code numbers otherwise than
the file does are renumbered."""

import json
import re
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import models, pre_tokenizers, processors

from llmjax.core.errors import UserError
from llmjax.text import fast, sentencepiece
from llmjax.text.base import Settings, Tokenizer, bos_eos
from llmjax.text.export import to_json
from llmjax.text.ranks import Tiktoken
from llmjax.text.raw import Bytes

MERGES = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*\n")
_GPT2_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
# A file's name → whose code takes the pieces' numbers as they are in it, or as fairseq does.
_MAKERS = {
  "spiece.model": ("T5", "MT5", "UMT5", "Albert"),
  "sentencepiece.bpe.model": ("XLMRoberta",),
}


def read(file: Path, config: dict) -> tuple[bytes, type[Tokenizer], Settings]:
  """Reads a file: the model, its class, and what the file says beside the model.

  Args:
    config: `tokenizer_config.json` beside it, `{}` where there is none.
  Raises:
    UserError: nothing that is understood.
  """
  data, plain = file.read_bytes(), Settings()
  if file.name in (*MERGES, *MERGES.values()):
    return _gpt2(file, config).to_str().encode(), fast.ByteBPE, plain
  if data[:1] == b"{":
    return _json(data, config)
  if _RANK_LINE.match(data):
    return data, Tiktoken, Settings(pattern=config.get("pattern"))
  if {b"[UNK]", b"[CLS]"} <= set(data.splitlines()):
    return _bert(data, config).to_str().encode(), fast.WordPiece, plain
  maker = config.get("tokenizer_class", "").removesuffix("Fast").removesuffix("Tokenizer")
  known = _MAKERS.get(file.name, (maker,))
  shifted = file.name == "sentencepiece.bpe.model"
  if maker not in known and (shifted or maker not in ("", "PreTrained")):
    raise UserError(
      f"how the tokenizer_class {maker!r} numbers the pieces of {file.name} is not known, only how "
      f"{', '.join(known)} do; give tokenizer.json"
    )
  data = _fairseq(data) if shifted else data
  return data, sentencepiece.kind_of(data), plain


def _json(data: bytes, config: dict) -> tuple[bytes, type[Tokenizer], Settings]:
  try:
    found = json.loads(data)
  except ValueError as error:
    raise UserError("the file is not a tokenizer.json") from error
  if {"config", "vocab"} <= found.keys():
    return _tekken(found)
  kind = fast.kind_of(data)
  listed = config.get("added_tokens_decoder", {}).items()
  raw = Bytes(b"", Settings(added={entry["content"]: int(i) for i, entry in listed}))
  if {**found, "post_processor": None} == json.loads(to_json(raw)):
    return b"", Bytes, Settings()
  return data, kind, Settings()


def _tekken(found: dict) -> tuple[bytes, type[Tokenizer], Settings]:
  """Mistral's: ranks behind a block of special tokens. Source: mistral-common's tekken.json."""
  if "special_tokens" not in found:
    raise UserError("this tekken.json lists no special_tokens, as old ones do; give tokenizer.json")
  config, listed = found["config"], found["special_tokens"]
  reserved = config.get("default_num_special_tokens") or len(listed)
  special = {f"<SPECIAL_{i}>": i for i in range(reserved)}
  named = {i: token for token, i in special.items()} | {t["rank"]: t["token_str"] for t in listed}
  special = {token: i for i, token in named.items()}
  size = config.get("default_vocab_size") or reserved + len(found["vocab"])
  ranks = enumerate((piece["token_bytes"] for piece in found["vocab"]), reserved)
  lines = [f"{token} {i}\n" for i, token in ranks if i < size]
  ids = (special.get(name) for name in ("<s>", "</s>", "<pad>"))
  affixes = bos_eos(special.get("<s>"), None)
  settings = Settings(*ids, added=special, pattern=config["pattern"], affixes=affixes)
  return "".join(lines).encode(), Tiktoken, settings


def _fairseq(data: bytes) -> bytes:
  """XLM-R's numbers: fairseq puts its four tokens first, and `<mask>` behind all pieces.

  Source: Conneau et al. 2020, arXiv:1911.02116; fairseq's dictionary.
  """
  spec = proto.ModelProto.FromString(sentencepiece.SentencePiece(data).to_bytes())
  pieces = [piece for piece in spec.pieces if piece.type not in (piece.UNKNOWN, piece.CONTROL)]
  piece, control = proto.ModelProto.SentencePiece, proto.ModelProto.SentencePiece.CONTROL
  first = [piece(piece=name, type=control) for name in ("<s>", "<pad>", "</s>")]
  unknown = piece(piece="<unk>", type=piece.UNKNOWN)
  pieces = [*first, unknown, *pieces, piece(piece="<mask>", type=control)]
  del spec.pieces[:]
  spec.pieces.extend(pieces)
  trained = spec.trainer_spec
  trained.bos_piece, trained.eos_piece, trained.pad_piece = "<s>", "</s>", "<pad>"
  trained.unk_piece, trained.vocab_size = "<unk>", len(pieces)
  return spec.SerializeToString()


def _gpt2(file: Path, config: dict) -> tokenizers.Tokenizer:
  maker = config.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
  if maker not in ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"):
    raise UserError(f"a vocabulary with merges of {maker} is not known; give tokenizer.json")
  name = {merges: vocab for vocab, merges in MERGES.items()}.get(file.name, file.name)
  model = models.BPE.from_file(str(file.parent / name), str(file.parent / MERGES[name]))
  cutting = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
  tokenizer = fast.byte_level(model, cutting)
  special = {name: tokenizer.token_to_id(name) for name in _GPT2_SPECIAL}
  tokenizer.add_special_tokens([name for name, i in special.items() if i is not None])
  if maker != "GPT2Tokenizer":
    pair = ((name, special[name]) for name in ("</s>", "<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(*pair)
  return tokenizer


def _bert(data: bytes, config: dict) -> tokenizers.Tokenizer:
  lines = data.decode().rstrip("\n").split("\n")  # splitlines would also cut at U+2028
  vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
  cased = any(line != line.lower() and not line.startswith("[") for line in vocabulary)
  return fast.bert(vocabulary, config.get("do_lower_case", not cased))
