"""tiktoken rank files: byte-level BPE whose merges are told by the order of the tokens.

`tiktoken` itself runs them: the rank file is its own format, so nothing has to be worked out first
(`tokenizers` would want the merges), and its threads are the faster. Rank files are read, never
trained. A file does not say how text is cut into words; the known ones are told by their length.
"""

import base64
import os

import tiktoken

from llmjax.core.errors import UserError
from llmjax.text.base import PLAIN, Settings, Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
  r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
O200K_PATTERN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
  rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama3_special() -> dict[str, int]:
  named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
  named[9] = "eot_id"
  spare = iter(range(256))
  names = [named.get(i) or f"reserved_special_token_{next(spare)}" for i in range(256)]
  return {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}


# number of ranks → (how text is cut, special tokens, BOS, EOS), from the makers' own code:
# GPT-2 and r50k_base, p50k_base, cl100k_base, Llama 3, Qwen, o200k_base.
_KNOWN = {
  50_256: (GPT2_PATTERN, {"<|endoftext|>": 50_256}, None, 50_256),
  50_280: (GPT2_PATTERN, {"<|endoftext|>": 50_256}, None, 50_256),
  100_256: (
    CL100K_PATTERN,
    {
      "<|endoftext|>": 100_257,
      "<|fim_prefix|>": 100_258,
      "<|fim_middle|>": 100_259,
      "<|fim_suffix|>": 100_260,
      "<|endofprompt|>": 100_276,
    },
    None,
    100_257,
  ),
  128_000: (LLAMA3_PATTERN, _llama3_special(), 128_000, 128_001),
  151_643: (
    QWEN_PATTERN,
    {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
    None,
    151_643,
  ),
  199_998: (O200K_PATTERN, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}, None, 199_999),
}


class Tiktoken(Tokenizer):
  """A rank file.

  Args:
    model: lines of base64 token, space, rank.
    settings: `pattern`, `added` and `eos_id` are needed where the file is of unknown length.
  Raises:
    UserError: no rank file, or one of unknown length and no pattern with it.
  """

  kind = "tiktoken"

  def __init__(self, model: bytes, settings: Settings = PLAIN):
    self.ranks = read_ranks(model)
    known = _KNOWN.get(len(self.ranks), (None, {}, None, None))
    self.pattern = settings.pattern or known[0]
    if not self.pattern:
      lengths = ", ".join(f"{length:,}" for length in _KNOWN)
      raise UserError(
        f"a rank file of {len(self.ranks):,} tokens is none of the known ones ({lengths}): "
        "how it cuts text must be given as a pattern"
      )
    special = {} if settings.pattern else known[1]
    size = 1 + max([*self.ranks.values(), *special.values()])
    super().__init__(model, settings, size, special, (*known[2:], None, None))
    self._encoding = tiktoken.Encoding(
      "llmjax", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
    )
    self._text_ids = frozenset(self.ranks.values())

  def _encode(self, text: str) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

  def _decode(self, ids: list[int]) -> str:
    known = [i for i in ids if i in self._text_ids]  # between ranks and special tokens are gaps
    return self._encoding.decode(known, errors="replace")


def read_ranks(model: bytes) -> dict[bytes, int]:
  """Reads a rank file: token → rank.

  Raises:
    UserError: a line that is not base64, space, number; or no byte-level vocabulary.
  """
  try:
    lines = [line.split() for line in model.splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
  except ValueError as error:  # binascii's too
    raise UserError("the file is not a tiktoken rank file") from error
  missing = sum(bytes([byte]) not in ranks for byte in range(256))
  if missing:
    raise UserError(f"the file is not a tiktoken rank file: it lacks {missing} of the 256 bytes")
  return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
  """Works out the merge that makes each token, in order: what `tokenizers` wants to be told.

  A token's last merge is what is left of it when only earlier tokens may be made.
  """
  found = []
  for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
      pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
      at = min(range(len(pairs)), key=pairs.__getitem__)
      if pairs[at] >= rank:
        break
      parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) == 2:
      found.append((parts[0], parts[1]))
  return found
