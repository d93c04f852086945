"""What the `tokenizers` library runs: byte-level BPE, WordPiece, and any other `tokenizer.json`.
One copy turns special tokens spelled out in text into their ids, one leaves them text."""

import functools
import itertools
import secrets
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer

from llmjax.core.errors import UserError
from llmjax.text.base import PLAIN, Settings, Tokenizer, too_large, too_small

_SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_STRIPS = ("lstrip", "rstrip", "single_word")
_ALIAS = secrets.token_hex(16)  # begins the alias of a special token, so that no text can hold one
_BERT_CHARS = 1000  # most characters of a trained WordPiece; rarer ones are [UNK], as in BERT
# Training takes time that grows with the square of a word's length, which is that of the whole text
# where it has no spaces. Longer words are therefore cut while a byte-level BPE is trained; those of
# more than 100 characters, which are [UNK] to BERT, are left out while a WordPiece is.
_LONGEST = pre_tokenizers.Split(tokenizers.Regex(".{1,256}"), "isolated")
_BERT_LONGEST = pre_tokenizers.Split(tokenizers.Regex(".{101,}"), "removed")

LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # cuts nothing
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


class Fast(Tokenizer):
  """A `tokenizer.json` of any make.

  Raises:
    UserError: the bytes are no `tokenizer.json`.
  """

  kind = "json"

  def __init__(self, model: bytes, settings: Settings = PLAIN):
    self._plain = tokenizer_of(model)
    self._plain.encode_special_tokens = True  # as ordinary text, the name means
    added = sorted(self._plain.get_added_tokens_decoder().items())
    special = {token.content: i for i, token in added if token.special}
    ids = self._plain.get_vocab(with_added_tokens=True)
    unk_id = ids.get(getattr(self._plain.model, "unk_token", None))
    super().__init__(model, settings, 1 + max(ids.values(), default=-1), special, unk_id)

  @functools.cached_property
  def _parsing(self) -> tokenizers.Tokenizer:
    return tokenizer_of(self._model)

  def template(self) -> list[list[int]] | None:
    tokens = (self._plain.id_to_token(i) or "" for i in range(self.vocab_size))
    # The affixes of the first text that has any token of its own between them.
    encodings = map(self._plain.encode, itertools.chain("a", tokens))
    found = next((each for each in encodings if 0 in each.special_tokens_mask), None)
    if found is None or 1 not in found.special_tokens_mask:
      return None
    mask = found.special_tokens_mask
    return [found.ids[: mask.index(0)], found.ids[len(mask) - mask[::-1].index(0) :]]

  def find(self, token: str) -> int | None:
    i = self._plain.token_to_id(token)
    return super().find(token) if i is None else i

  def added_tokens(self) -> dict[str, dict]:
    names = (*_STRIPS, "normalized", "special")
    found = self._plain.get_added_tokens_decoder().values()
    return {token.content: {name: getattr(token, name) for name in names} for token in found}

  def spell(self, i: int) -> str:
    return self.special_names.get(i) or self._plain.id_to_token(i)

  @functools.cached_property
  def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A copy that knows special tokens under an alias alone; the aliases' ids → the tokens' own."""
    aliased, ids = tokenizer_of(self._model), {}
    aliased.encode_special_tokens = True
    for i, token in sorted(aliased.get_added_tokens_decoder().items()):
      if token.special:
        flags = {name: getattr(token, name) for name in _STRIPS}
        alias = tokenizers.AddedToken(_ALIAS + token.content, normalized=False, **flags)
        aliased.add_tokens([alias])
        ids[aliased.token_to_id(alias.content)] = i
    return aliased, ids

  def encode(self, text: str, allow_special: bool = False, cut: str = "") -> list[int]:
    if not allow_special or self.settings.added:
      return super().encode(text, allow_special, cut)
    if not cut or cut not in text:
      return self._parsing.encode(text, add_special_tokens=False).ids
    aliased, ids = self._aliased
    text = self._special.sub(lambda found: _ALIAS + found[0], text).replace(cut, "")
    return [ids.get(i, i) for i in aliased.encode(text, add_special_tokens=False).ids]

  def _encode(self, text: str) -> list[int]:
    return self._plain.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    found = self._plain.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def _decode(self, ids: list[int]) -> str:
    return self._plain.decode(ids)

  def _check_size(self, vocab_size: int) -> "Fast":
    if self.vocab_size < vocab_size:
      raise too_large(vocab_size, self.vocab_size)
    return self

  @classmethod
  def build(cls, tokenizer: tokenizers.Tokenizer, settings: Settings = PLAIN) -> "Fast":
    """Wraps a tokenizer made with the library."""
    return cls(tokenizer.to_str().encode(), settings)


class ByteBPE(Fast):
  """Byte-level BPE; trained here, it has GPT-2's pre-tokenization and loses nothing."""

  kind = "bpe"

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "ByteBPE":
    """Trains `vocab_size` tokens, counting 256 bytes and 3 special ones.

    Raises:
      UserError: the text supports fewer tokens than asked for, or the bytes alone need more.
    """
    least = 256 + len(_SPECIAL)
    if vocab_size < least:
      raise too_small(vocab_size, "256 bytes and 3 special tokens", least)
    tokenizer = byte_level(models.BPE(), pre_tokenizers.Sequence([GPT2_WORDS, _LONGEST]))
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size, min_frequency=2, special_tokens=_SPECIAL,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = [(token, tokenizer.token_to_id(token)) for token in _SPECIAL[:1]]
    tokenizer.post_processor = processors.TemplateProcessing(f"{_SPECIAL[0]} $A", None, first)
    tokenizer.pre_tokenizer = GPT2_WORDS
    return cls.build(tokenizer)._check_size(vocab_size)


class WordPiece(Fast):
  """BERT's WordPiece. Lossy: case, accents and spacing go, and rare characters are [UNK]."""

  kind = "wordpiece"

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "WordPiece":
    """Trains `vocab_size` lower case tokens, counting characters and 5 special ones.

    Raises:
      UserError: the text supports fewer tokens than asked for, or its characters need more.
    """
    texts = list(texts)
    # The library would number the characters in the order of a hash map, another one every time.
    first = [*_BERT_SPECIAL, *_characters(texts)]
    if vocab_size < len(first):
      parts = "5 special tokens and the text's own characters"
      raise too_small(vocab_size, parts, len(first))
    trainer = trainers.WordPieceTrainer(
      vocab_size=vocab_size, min_frequency=2, special_tokens=first, limit_alphabet=0,
      show_progress=False,
    )
    scratch = bert(None, lowercase=True)
    scratch.pre_tokenizer = pre_tokenizers.Sequence([scratch.pre_tokenizer, _BERT_LONGEST])
    scratch.train_from_iterator(texts, trainer)
    return cls.build(bert(scratch.get_vocab(), lowercase=True))._check_size(vocab_size)


def byte_level(model: models.Model, cutting: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
  """Makes a byte-level tokenizer; `cutting` must end by mapping bytes to letters."""
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = cutting
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def words(*patterns: str) -> pre_tokenizers.PreTokenizer:
  """The byte-level pre-tokenizer that splits at matches of one regular expression after another."""
  cuts = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in patterns]
  return pre_tokenizers.Sequence([*cuts, LETTERS])


def bert(vocabulary: dict[str, int] | None, lowercase: bool) -> tokenizers.Tokenizer:
  """Makes BERT's tokenizer of pieces, inside a word with `##`; `lowercase` drops accents too."""
  written = BertWordPieceTokenizer(vocabulary, lowercase=lowercase).to_str()
  return tokenizers.Tokenizer.from_str(written)


def kind_of(model: bytes) -> type[Fast]:
  """Tells the class of a `tokenizer.json`; its errors are those of `Fast`."""
  kinds = {models.BPE: ByteBPE, models.WordPiece: WordPiece}
  return kinds.get(type(tokenizer_of(model).model), Fast)


def tokenizer_of(model: bytes) -> tokenizers.Tokenizer:
  """Parses a `tokenizer.json`, without its truncation and padding."""
  try:
    tokenizer = tokenizers.Tokenizer.from_str(model.decode())
  except Exception as error:  # the library raises plain `Exception`
    raise UserError("the file is not a tokenizer.json") from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _characters(texts: list[str]) -> list[str]:
  """The most frequent 1,000 characters, and as `##c` those of them that stand inside words."""
  normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  words, counts = Counter(), Counter()
  for text in texts:
    words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
  for word, times in words.items():
    counts.update({char: times * number for char, number in Counter(word).items()})
  kept = set(sorted(counts, key=lambda char: (-counts[char], char))[:_BERT_CHARS])
  inner = {char for word in words for char in word[1:]} & kept
  return [*sorted(kept), *(f"##{char}" for char in sorted(inner))]
