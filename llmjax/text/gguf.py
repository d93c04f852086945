"""Tokenizers out of GGUF metadata, the vocabulary that llama.cpp's model files carry.

Takes a plain dict of the `tokenizer.*` values; reading the file is not this floor's concern. The
metadata name a behaviour rather than spell it out, so what the names mean is written down here.
"""

from collections.abc import Mapping

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, models, pre_tokenizers

from llmjax.core.errors import UserError, nearest
from llmjax.text import fast
from llmjax.text.base import NONE, Settings, Tokenizer, ends
from llmjax.text.ranks import LLAMA3_PATTERN, QWEN_PATTERN
from llmjax.text.sentencepiece import SentencePiece

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types, numbered as SentencePiece's
_BERT_SPACE = "▁"  # begins the pieces that begin a word

_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), fast.GPT2_WORDS])
# tokenizer.ggml.pre → how text is cut; the names are llama.cpp's.
_CUTTING = {
  **dict.fromkeys(("gpt-2", "mpt", "olmo"), fast.GPT2_WORDS),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
  **dict.fromkeys(("llama-bpe", "llama3", "dbrx"), fast.words(LLAMA3_PATTERN)),
  "qwen2": fast.words(QWEN_PATTERN),
}


def from_gguf(metadata: Mapping) -> Tokenizer:
  """Builds the tokenizer that GGUF metadata describe.

  Args:
    metadata: values under their full names: `tokenizer.ggml.model` (`llama`, `gpt2` or `bert`),
      `.tokens`, `.scores`, `.token_type`, `.merges`, `.pre`, `.bos_token_id` and the like, and
      `tokenizer.chat_template`.
  Returns:
    A tokenizer of kind `sentencepiece`, `bpe` or `wordpiece`.
  Raises:
    UserError: a value is missing, or names something that is not known here.
  Source: the tokenizer keys of ggml's docs/gguf.md; behaviours as in llama.cpp's src/llama-vocab.
  """
  values = _Values({key.removeprefix(_PREFIX): value for key, value in metadata.items()})
  model = values["model"]
  kinds = {"llama": _llama, "gpt2": _gpt2, "bert": _bert}
  if model not in kinds:
    raise UserError(f"GGUF tokenizer model {model!r} is not known; {nearest(str(model), kinds)}")
  return kinds[model](values, _settings(values))


class _Values(dict):
  """Metadata without their prefix."""

  def __missing__(self, name: str):
    raise UserError(f"the GGUF metadata hold no {_PREFIX + name!r}")


def _settings(values: _Values) -> Settings:
  bos_id = values.get("bos_token_id", values.get("cls_token_id", NONE))
  # "seperator" is the format's own spelling
  eos_id = values.get("eos_token_id", values.get("seperator_token_id", NONE))
  first = values.get("add_bos_token", values["model"] != "gpt2")
  last = values.get("add_eos_token", values["model"] == "bert")
  return Settings(
    bos_id=bos_id,
    eos_id=eos_id,
    pad_id=values.get("padding_token_id", NONE),
    chat_template=values.get("tokenizer.chat_template"),
    around=ends(bos_id if first else NONE, eos_id if last else NONE),
  )


def _types(values: _Values) -> list[int]:
  return values.get("token_type", [1] * len(values["tokens"]))


def _llama(values: _Values, settings: Settings) -> SentencePiece:
  """A SentencePiece BPE model of the same pieces and scores."""
  model = proto.ModelProto()
  for token, score, kind in zip(values["tokens"], values["scores"], _types(values), strict=True):
    model.pieces.add(piece=token, score=float(score), type=kind)
  if _UNKNOWN not in (piece.type for piece in model.pieces):
    model.pieces[int(values.get("unknown_token_id", 0))].type = _UNKNOWN
  trained, normal = model.trainer_spec, model.normalizer_spec
  trained.model_type = proto.TrainerSpec.BPE
  trained.byte_fallback = any(piece.type == piece.BYTE for piece in model.pieces)
  trained.vocab_size = len(model.pieces)
  trained.unk_piece = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
  if settings.bos_id != NONE:
    trained.bos_piece = model.pieces[settings.bos_id].piece
  if settings.eos_id != NONE:
    trained.eos_piece = model.pieces[settings.eos_id].piece
  normal.name = "identity"
  normal.add_dummy_prefix = bool(values.get("add_space_prefix", True))
  normal.remove_extra_whitespaces = bool(values.get("remove_extra_whitespaces", False))
  return SentencePiece(model.SerializeToString(), settings)


def _gpt2(values: _Values, settings: Settings) -> fast.ByteBPE:
  pre = values.get("pre", "gpt-2")
  if pre not in _CUTTING:
    raise UserError(f"GGUF pre-tokenizer {pre!r} is not known; {nearest(str(pre), _CUTTING)}")
  vocabulary = {token: i for i, token in enumerate(values["tokens"])}
  merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
  # Llama 3's own tokenizer takes a whole word that is a token before it merges anything.
  whole_words = pre in ("llama-bpe", "llama3")
  model = models.BPE(vocabulary, merges, ignore_merges=whole_words)
  made = fast.byte_level(model, _CUTTING[pre])
  both = list(zip(values["tokens"], _types(values), strict=True))
  made.add_special_tokens([token for token, kind in both if kind == _CONTROL])
  own = [AddedToken(token, normalized=False) for token, kind in both if kind == _USER_DEFINED]
  made.add_tokens(own)
  return fast.ByteBPE.build(made, settings)


def _bert(values: _Values, settings: Settings) -> fast.WordPiece:
  """BERT's own spelling: pieces inside a word begin with `##`, others with nothing."""

  def spell(token: str, kind: int) -> str:
    if token.startswith(_BERT_SPACE):
      return token.removeprefix(_BERT_SPACE)
    named = token.startswith("[") and token.endswith("]") and len(token) > 2
    return f"##{token}" if kind == 1 and not named else token

  spelled = map(spell, values["tokens"], _types(values))
  return fast.WordPiece.build(fast.bert({t: i for i, t in enumerate(spelled)}, True), settings)
