"""How well a tokenizer suits some text: lengths, losses, speed."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence

from llmjax.core.errors import UserError
from llmjax.text.tokenizer import Tokenizer


def report(tokenizer: Tokenizer, texts: Sequence[str]) -> dict:
  """Measures a tokenizer on documents.

  Returns:
    `documents`, `bytes` (UTF-8), `characters`, `tokens`; `bytes_per_token` and
    `characters_per_token`; `unknown_rate`, the share of tokens that are UNK; `exact_rate`, the
    share of documents that decode to themselves; `vocabulary_used`, the share of ids that occur;
    `megabytes_per_s` (10⁶ bytes) and `tokens_per_s` of encoding them as one batch.
  Raises:
    UserError: the texts make no token.
  """
  began_s = time.perf_counter()
  encoded = tokenizer.encode_batch(list(texts))
  seconds = time.perf_counter() - began_s
  counts = Counter(itertools.chain.from_iterable(encoded))
  tokens = counts.total()
  if not tokens:
    raise UserError(f"{len(texts)} documents make no token; a report needs text")
  size_bytes = sum(len(text.encode()) for text in texts)
  characters = sum(map(len, texts))
  exact = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
  return {
    "documents": len(texts),
    "bytes": size_bytes,
    "characters": characters,
    "tokens": tokens,
    "bytes_per_token": size_bytes / tokens,
    "characters_per_token": characters / tokens,
    "unknown_rate": counts[tokenizer.unk_id] / tokens,
    "exact_rate": exact / len(texts),
    "vocabulary_used": len(counts) / tokenizer.vocab_size,
    "megabytes_per_s": size_bytes / seconds / 1e6,
    "tokens_per_s": tokens / seconds,
  }
