"""Tokenizers out of GGUF metadata, the vocabulary that llama.cpp's model files carry.

Takes a plain dict of the `tokenizer.*` values; reading the file is not this floor's concern. The
metadata name a behaviour rather than spell it out, so what the names mean is written down here.
"""

from collections.abc import Mapping

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from llmjax.core.errors import UserError, nearest
from llmjax.text import fast
from llmjax.text.base import NONE, Base, Settings
from llmjax.text.ranks import LLAMA3_PATTERN, QWEN_PATTERN
from llmjax.text.sentencepiece import SentencePiece

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types, numbered as SentencePiece's
_BERT_SPACE = "▁"  # begins the pieces that begin a word

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
_DIGITS = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]


def _words(pattern: str) -> list:
  return [pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES]


# tokenizer.ggml.pre → how text is cut; the names are llama.cpp's.
_CUTTING = {
  "gpt-2": _GPT2,
  "mpt": _GPT2,
  "olmo": _GPT2,
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "refact": _DIGITS,
  "command-r": _DIGITS,
  "llama-bpe": _words(LLAMA3_PATTERN),
  "llama3": _words(LLAMA3_PATTERN),
  "dbrx": _words(LLAMA3_PATTERN),
  "qwen2": _words(QWEN_PATTERN),
}


def from_gguf(metadata: Mapping) -> Base:
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
  model = _value(metadata, "model")
  kinds = {"llama": _llama, "gpt2": _gpt2, "bert": _bert}
  if model not in kinds:
    raise UserError(f"GGUF tokenizer model {model!r} is not known; {nearest(str(model), kinds)}")
  return kinds[model](metadata, _settings(metadata))


def _value(metadata: Mapping, name: str):
  key = f"tokenizer.ggml.{name}"
  if key not in metadata:
    raise UserError(f"the GGUF metadata hold no {key!r}")
  return metadata[key]


def _settings(metadata: Mapping) -> Settings:
  def chosen(*names):
    found = (metadata.get(f"tokenizer.ggml.{name}") for name in names)
    return next((int(i) for i in found if i is not None), NONE)

  return Settings(
    bos_id=chosen("bos_token_id", "cls_token_id"),
    eos_id=chosen("eos_token_id", "seperator_token_id"),  # so spelled in the format
    pad_id=chosen("padding_token_id"),
    chat_template=metadata.get("tokenizer.chat_template"),
    add_bos=metadata.get("tokenizer.ggml.add_bos_token"),
  )


def _types(metadata: Mapping) -> list[int]:
  tokens = _value(metadata, "tokens")
  return [int(t) for t in metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))]


def _llama(metadata: Mapping, settings: Settings) -> SentencePiece:
  """A SentencePiece BPE model of the same pieces and scores."""
  model = proto.ModelProto()
  tokens, scores = _value(metadata, "tokens"), _value(metadata, "scores")
  for token, score, kind in zip(tokens, scores, _types(metadata), strict=True):
    model.pieces.add(piece=token, score=float(score), type=kind)
  if _UNKNOWN not in (piece.type for piece in model.pieces):
    model.pieces[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))].type = _UNKNOWN
  trained, normal = model.trainer_spec, model.normalizer_spec
  trained.model_type = proto.TrainerSpec.BPE
  trained.byte_fallback = any(piece.type == piece.BYTE for piece in model.pieces)
  trained.vocab_size = len(model.pieces)
  names = [piece.piece for piece in model.pieces]
  trained.unk_piece = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
  if settings.bos_id not in (None, NONE):
    trained.bos_piece = names[settings.bos_id]
  if settings.eos_id not in (None, NONE):
    trained.eos_piece = names[settings.eos_id]
  normal.name = "identity"
  normal.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
  normal.remove_extra_whitespaces = bool(
    metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
  )
  return SentencePiece(model.SerializeToString(), settings)


def _gpt2(metadata: Mapping, settings: Settings) -> fast.ByteBPE:
  pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
  if pre not in _CUTTING:
    raise UserError(f"GGUF pre-tokenizer {pre!r} is not known; {nearest(str(pre), _CUTTING)}")
  tokens = _value(metadata, "tokens")
  vocabulary = {token: i for i, token in enumerate(tokens)}
  merges = [tuple(merge.split(" ", 1)) for merge in _value(metadata, "merges")]
  # Llama 3's own tokenizer takes a whole word that is a token before it merges anything.
  whole_words = pre in ("llama-bpe", "llama3")
  made = fast.byte_level(
    models.BPE(vocabulary, merges, ignore_merges=whole_words), _CUTTING[pre]
  )
  kinds = _types(metadata)
  control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
  own = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
  made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
  made.add_tokens([AddedToken(token, normalized=False) for token in own])
  return fast.ByteBPE.build(made, settings)


def _bert(metadata: Mapping, settings: Settings) -> fast.WordPiece:
  """BERT's own spelling: pieces inside a word begin with `##`, others with nothing."""

  def spell(token: str, kind: int) -> str:
    if token.startswith(_BERT_SPACE):
      return token.removeprefix(_BERT_SPACE)
    return f"##{token}" if kind == 1 and not _is_name(token) else token

  tokens = _value(metadata, "tokens")
  spelled = map(spell, tokens, _types(metadata))
  return fast.WordPiece.build(fast.bert({t: i for i, t in enumerate(spelled)}, True), settings)


def _is_name(token: str) -> bool:
  return token.startswith("[") and token.endswith("]") and len(token) > 2
