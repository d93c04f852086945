"""Any tokenizer as a `tokenizer.json`: merges are worked out from SentencePiece's scores and
tiktoken's ranks, and the normalisation is spelled out as the steps it consists of."""

import json
import re
from collections.abc import Sequence

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import decoders, models, normalizers

from llmjax.text.base import Tokenizer
from llmjax.text.fast import LETTERS, Fast, byte_level, tokenizer_of, words
from llmjax.text.ranks import Tiktoken
from llmjax.text.raw import Bytes
from llmjax.text.sentencepiece import SentencePiece

_SPACE = "▁"


def to_json(tokenizer: Tokenizer, affixes: Sequence[Sequence[int]] | None = None) -> bytes:
  """Writes a tokenizer as a `tokenizer.json`.

  Ids are the same for every text with one exception: our own SentencePiece models spell a U+2581
  in three bytes, for which the format has no means; there it comes back as a space.

  Args:
    affixes: ids that the file is to put around a text; None: those of the model file itself.
  """
  written = _convert(tokenizer)
  if affixes is None or affixes == (tokenizer.template() or [[], []]):
    return written
  names = {i: tokenizer_of(written).id_to_token(i) for ids in affixes for i in ids}
  tokens = {i: {"SpecialToken": {"id": name, "type_id": 0}} for i, name in names.items()}
  prefix, suffix = ([tokens[i] for i in ids] for ids in affixes)
  one, other = ([*prefix, {"Sequence": {"id": text, "type_id": 0}}, *suffix] for text in "AB")
  special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()}
  template = {"type": "TemplateProcessing", "single": one, "pair": one + other}
  post_processor = {**template, "special_tokens": special}
  changed = {**json.loads(written), "post_processor": post_processor}
  return json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()


def _convert(tokenizer: Tokenizer) -> bytes:
  if isinstance(tokenizer, Fast):
    return tokenizer.to_bytes()
  if isinstance(tokenizer, SentencePiece):
    converted = _from_pieces(tokenizer)
  elif isinstance(tokenizer, Tiktoken):
    converted = _from_ranks(tokenizer)
  elif isinstance(tokenizer, Bytes):
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    converted = byte_level(models.BPE(vocabulary | tokenizer.special_tokens, []), LETTERS)
  converted.add_special_tokens(sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get))
  return converted.to_str().encode()


def byte_letters() -> list[str]:
  """The letter that stands for each byte in GPT-2's and all later byte-level vocabularies.

  Source: bytes_to_unicode in openai/gpt-2's encoder.py: printable Latin-1 stands for itself, the
  others are numbered on from U+0100.
  """
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = iter(range(0x100, 0x200))
  return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def _from_ranks(tokenizer: Tiktoken) -> tokenizers.Tokenizer:
  letters = byte_letters()
  ranks = {"".join(letters[b] for b in token): rank for token, rank in tokenizer.ranks.items()}
  vocabulary = ranks | tokenizer.special_tokens  # here they keep their ids, which may leave gaps
  # A word that is a token is that token, also where no merge leads to it.
  model = models.BPE(vocabulary, _merges(sorted(ranks, key=ranks.get)), ignore_merges=True)
  # In Oniguruma a + after {1,3} repeats, elsewhere it only forbids going back.
  pattern = re.sub(r"(?<=\d\})\+", "", tokenizer.pattern)
  return byte_level(model, words(pattern))


def _from_pieces(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
  spec = tokenizer.spec
  fallback = any(piece.type == piece.BYTE for piece in spec.pieces)
  if spec.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM:
    scores = [(piece.piece, piece.score) for piece in spec.pieces]
    model = models.Unigram(scores, tokenizer.unk_id, byte_fallback=fallback)
  else:
    vocabulary = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    scores = {piece.piece: piece.score for piece in spec.pieces if piece.type == piece.NORMAL}
    merges = _merges(sorted(scores, key=scores.get, reverse=True))
    how = {"unk_token": spec.pieces[tokenizer.unk_id].piece, "byte_fallback": fallback}
    model = models.BPE(vocabulary | tokenizer.special_tokens, merges, fuse_unk=True, **how)
  converted = tokenizers.Tokenizer(model)
  steps, rules = [], spec.normalizer_spec
  decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    edges, runs = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
    steps += [normalizers.Replace(edges, ""), normalizers.Replace(runs, " ")]
  if rules.add_dummy_prefix:
    steps.append(normalizers.Prepend(_SPACE))
    decoding.append(decoders.Strip(" ", 1, 0))
  converted.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
  converted.decoder = decoders.Sequence(decoding)
  user_defined = [piece.piece for piece in spec.pieces if piece.type == piece.USER_DEFINED]
  converted.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in user_defined])
  return converted


def _merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
  """Every way to make a token of two others, for tokens in the order in which they are made."""
  known = set(tokens)
  return [
    (token[:cut], token[cut:])
    for token in tokens
    for cut in range(1, len(token))
    if token[:cut] in known and token[cut:] in known
  ]
