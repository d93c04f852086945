"""Tokenizers out of GGUF metadata, a dict of the `tokenizer.*` values of llama.cpp's model files.
The metadata name a behaviour rather than spell it out; what the names mean is written down here."""

import re
from collections.abc import Mapping

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, models

from llmjax.core.errors import UserError, nearest, note
from llmjax.text import fast
from llmjax.text.base import NONE, Settings, Tokenizer, bos_eos
from llmjax.text.cutting import PATTERNS, WHOLE_WORDS, WITH_BOS
from llmjax.text.sentencepiece import SentencePiece, Unigram

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types, numbered as SentencePiece's
# Tokens that end a text for llama.cpp wherever a vocabulary has them.
_ENDS = (
  "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
  "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<|end_of_text|>",
  "<end_of_utterance>",
)
_BERT_SPACE = "▁"  # begins the pieces that begin a word

# Keys that are read, or that name tokens which nothing here needs.
_KNOWN = re.compile(
  r"model|pre|tokens|scores|merges|token_type(_count)?|\w+_token(_id)?|add_space_prefix|"
  r"remove_extra_whitespaces|precompiled_charsmap|normalizer\.(lowercase|strip_accents)|"
  r"tokenizer\.chat_template"
)
# Kind of tokenizer → llama.cpp's defaults: ids of BOS, EOS and PAD, and whether BOS and EOS are put
# around a text.
_DEFAULTS = {
  "llama": (1, 2, NONE, True, False), "gpt2": (11, 11, NONE, False, False),
  "bert": (101, 102, 0, True, True), "t5": (NONE, 1, 0, False, True),
}


def from_gguf(metadata: Mapping) -> Tokenizer:
  """Builds the tokenizer that GGUF metadata describe.

  Args:
    metadata: values under their full names: `tokenizer.ggml.model` (`llama`, `gpt2`, `bert` or
      `t5`: kind `sentencepiece`, `bpe`, `wordpiece` or `unigram`), `.tokens` and the like.
  Raises:
    UserError: a value is missing, or names something that is not known here.
  Source: the tokenizer keys of ggml's docs/gguf.md; behaviours as in llama.cpp's src/llama-vocab.
  """
  values = _Values({key.removeprefix(_PREFIX): value for key, value in metadata.items()})
  model = values["model"]
  kinds = {"llama": _sentencepiece, "gpt2": _gpt2, "bert": _bert, "t5": _sentencepiece}
  if model in ("none", "no_vocab"):
    raise UserError("the GGUF file holds no vocabulary")
  if model not in kinds:
    raise UserError(f"GGUF tokenizer model {model!r} is not known; {nearest(str(model), kinds)}")
  own = [name for name in metadata if name.startswith("tokenizer.")]
  unknown = [name for name in own if not _KNOWN.fullmatch(name.removeprefix(_PREFIX))]
  if unknown:
    note(f"nothing reads these keys of the GGUF file: {', '.join(unknown)}")
  try:
    return kinds[model](values, _settings(values))
  except UserError:
    raise
  except Exception as error:  # libraries trip anywhere over a vocabulary that contradicts itself
    why = " ".join(str(error).split())[:100]
    raise UserError(f"the GGUF metadata's {model} tokenizer cannot be built: {why}") from error


class _Values(dict):
  def __missing__(self, name: str):
    raise UserError(f"the GGUF metadata hold no {_PREFIX + name!r}")


def _settings(values: _Values) -> Settings:
  bos_id = _id(values, 0, "bos", "cls")
  # "seperator" is the format's own spelling
  eos_id = _id(values, 1, *(("seperator", "eos") if values["model"] == "bert" else ("eos",)))
  first, last = _DEFAULTS[values["model"]][3:]
  first = values.get("add_bos_token", first or values.get("pre") in WITH_BOS)
  last = values.get("add_eos_token", last)
  if values["model"] == "bert":
    first = last = True
  for name, i in (("bos", bos_id), ("eos", eos_id)):
    if values.get(f"add_{name}_token") and i == NONE:
      raise UserError(f"the GGUF metadata have add_{name}_token, but no {name}_token_id")
  return Settings(
    bos_id=bos_id, eos_id=eos_id, pad_id=_id(values, 2, "padding"),
    chat_template=values.get("tokenizer.chat_template"),
    affixes=bos_eos(bos_id if first else NONE, eos_id if last else NONE),
    ends=_ends(values, eos_id) or None,
  )


def _id(values: _Values, column: int, *names: str) -> int:
  """A special token's id: of the first key that is there, else llama.cpp's, if it is spelled so."""
  for key in (f"{name}_token_id" for name in names):
    if values.get(key) is not None:
      return values[key]
  default, tokens = _DEFAULTS[values["model"]][column], values["tokens"]
  token = tokens[default] if 0 <= default < len(tokens) else ""
  return default if re.fullmatch(r"<.*>|\[.*\]", token) else NONE


def _ends(values: _Values, eos_id: int) -> list[int]:
  """The stop ids beside EOS, by keys and by llama.cpp's list of names."""
  keyed = [values.get(f"{name}_token_id") for name in ("eot", "eom")]
  tokens = list(values.get("tokens", ()))
  named = [tokens.index(name) for name in _ENDS if name in tokens]
  found = dict.fromkeys([*keyed, *named])
  return [int(i) for i in found if i not in (None, eos_id)]


def _types(values: _Values) -> list[int]:
  return values.get("token_type", [1] * len(values["tokens"]))


def _sentencepiece(values: _Values, settings: Settings) -> SentencePiece:
  unigram = values["model"] == "t5"
  model = proto.ModelProto()
  for token, score, kind in zip(values["tokens"], values["scores"], _types(values), strict=True):
    model.pieces.add(piece=token, score=float(score), type=kind)
  if _UNKNOWN not in (piece.type for piece in model.pieces):
    model.pieces[int(values.get("unknown_token_id", 0))].type = _UNKNOWN
  trained, normal = model.trainer_spec, model.normalizer_spec
  trained.model_type = proto.TrainerSpec.UNIGRAM if unigram else proto.TrainerSpec.BPE
  trained.byte_fallback = any(piece.type == piece.BYTE for piece in model.pieces)
  trained.vocab_size = len(model.pieces)
  trained.unk_piece = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
  for name in ("bos", "eos"):
    if (i := getattr(settings, f"{name}_id")) != NONE:
      setattr(trained, f"{name}_piece", model.pieces[i].piece)
  normal.name = "identity"
  rules = values.get("precompiled_charsmap", ())  # bytes, with a sign or without
  normal.precompiled_charsmap = bytes(number % 256 for number in rules)
  normal.add_dummy_prefix = bool(values.get("add_space_prefix", not unigram))
  normal.remove_extra_whitespaces = bool(values.get("remove_extra_whitespaces", False))
  return (Unigram if unigram else SentencePiece)(model.SerializeToString(), settings)


def _gpt2(values: _Values, settings: Settings) -> fast.ByteBPE:
  pre = values.get("pre", "default")
  if "pre" not in values:
    note(
      "the GGUF file does not say how its tokenizer cuts text ('tokenizer.ggml.pre' is missing); "
      "'default' is taken, and ids may differ from those the model was trained on", "warning",
    )
  if pre not in PATTERNS:
    raise UserError(f"GGUF pre-tokenizer {pre!r} is not known; {nearest(str(pre), PATTERNS)}")
  vocabulary = {token: i for i, token in enumerate(values["tokens"])}
  if len(vocabulary) < len(values["tokens"]):
    raise UserError("the GGUF metadata's vocabulary holds a token twice")
  merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
  model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS)
  tokenizer = fast.byte_level(model, fast.words(*PATTERNS[pre]))
  typed = list(zip(values["tokens"], _types(values), strict=True))
  tokenizer.add_special_tokens([token for token, kind in typed if kind == _CONTROL])
  plain = [AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED]
  tokenizer.add_tokens(plain)
  return fast.ByteBPE.build(tokenizer, settings)


def _bert(values: _Values, settings: Settings) -> fast.WordPiece:
  def spell(token: str, kind: int) -> str:
    if token.startswith(_BERT_SPACE):
      return token.removeprefix(_BERT_SPACE)
    named = token.startswith("[") and token.endswith("]") and len(token) > 2
    return f"##{token}" if kind == 1 and not named else token

  lower = bool(values.get("normalizer.lowercase", True))
  if bool(values.get("normalizer.strip_accents", lower)) != lower:
    raise UserError("a GGUF tokenizer that drops case or accents, but not both, is not known")
  spelled = map(spell, values["tokens"], _types(values))
  return fast.WordPiece.build(fast.bert({t: i for i, t in enumerate(spelled)}, lower), settings)
