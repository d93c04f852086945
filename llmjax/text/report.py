"""How well a tokenizer suits some text: lengths, losses, speed."""

import time
from collections.abc import Sequence

import numpy as np

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
  rows = tokenizer.encode_batch(list(texts))
  seconds = time.perf_counter() - began_s
  tokens = sum(map(len, rows))
  if not tokens:
    raise UserError(f"{len(texts)} documents make no token; a report needs text")
  ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
  counts = np.bincount(ids, minlength=tokenizer.vocab_size)
  size_bytes = sum(len(text.encode()) for text in texts)
  characters = sum(map(len, texts))
  exact = sum(tokenizer.decode(row) == text for row, text in zip(rows, texts, strict=True))
  unknown = 0 if tokenizer.unk_id is None else int(counts[tokenizer.unk_id])
  return {
    "documents": len(texts),
    "bytes": size_bytes,
    "characters": characters,
    "tokens": tokens,
    "bytes_per_token": size_bytes / tokens,
    "characters_per_token": characters / tokens,
    "unknown_rate": unknown / tokens,
    "exact_rate": exact / len(texts),
    "vocabulary_used": float(np.mean(counts > 0)),
    "megabytes_per_s": size_bytes / seconds / 1e6,
    "tokens_per_s": tokens / seconds,
  }
