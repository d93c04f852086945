"""tiktoken rank files: byte-level BPE whose merges follow from the order of the tokens, run by
`tiktoken`. A file does not say its pre-tokenization; the known ones are told by their length."""

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


def _numbered(first: int, *names: str) -> dict[str, int]:
  return {f"<|{name}|>": i for i, name in enumerate(names, first)}


_CL100K = _numbered(100_257, "endoftext", "fim_prefix", "fim_middle", "fim_suffix")
_SPARE = [f"reserved_special_token_{number}" for number in range(251)]
_LLAMA3 = ["begin_of_text", "end_of_text", *_SPARE[:4]]
_LLAMA3 += ["start_header_id", "end_header_id", _SPARE[4], "eot_id", *_SPARE[5:]]
# number of ranks → (how text is cut, special tokens), from the makers' own code: GPT-2 and
# r50k_base, p50k_base, cl100k_base, Llama 3, Qwen, o200k_base.
_KNOWN = {
  50_256: (GPT2_PATTERN, _numbered(50_256, "endoftext")),
  50_280: (GPT2_PATTERN, _numbered(50_256, "endoftext")),
  100_256: (CL100K_PATTERN, _CL100K | _numbered(100_276, "endofprompt")),
  128_000: (LLAMA3_PATTERN, _numbered(128_000, *_LLAMA3)),
  151_643: (QWEN_PATTERN, _numbered(151_643, "endoftext", "im_start", "im_end")),
  199_998: (O200K_PATTERN, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
}


class Tiktoken(Tokenizer):
  """A rank file: lines of base64 token, space, rank.

  Args:
    settings: `pattern`, `added` and `eos_id` are needed where the file is of unknown length.
  Raises:
    UserError: no rank file, or one of unknown length and no pattern with it.
  """

  kind = "tiktoken"

  def __init__(self, model: bytes, settings: Settings = PLAIN):
    self.ranks = _read(model)
    known = _KNOWN.get(len(self.ranks), (None, {}))
    self.pattern, special = (settings.pattern, {}) if settings.pattern else known
    if not self.pattern:
      lengths = ", ".join(f"{length:,}" for length in _KNOWN)
      raise UserError(
        f"a rank file of {len(self.ranks):,} tokens is none of the known ones ({lengths}): "
        "how it cuts text must be given as a pattern"
      )
    self.adds = ("<|begin_of_text|>" in special, False)  # as Llama 3's own code does
    size = 1 + max([*self.ranks.values(), *special.values()])
    super().__init__(model, settings, size, special)
    self._encoding = tiktoken.Encoding(
      "llmjax", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
    )
    self._text_ids = frozenset(self.ranks.values())

  def _encode(self, text: str) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

  def _decode(self, ids: list[int]) -> str:
    known = [i for i in ids if i in self._text_ids]  # between ranks and special tokens are gaps
    return self._encoding.decode(known, errors="replace")


def _read(model: bytes) -> dict[bytes, int]:
  try:
    lines = [line.split() for line in model.splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
  except ValueError as error:  # binascii's too
    raise UserError("the file is not a tiktoken rank file") from error
  missing = sum(bytes([byte]) not in ranks for byte in range(256))
  if missing:
    raise UserError(f"the file is not a tiktoken rank file: it lacks {missing} of the 256 bytes")
  return ranks
