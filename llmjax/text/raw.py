"""Raw bytes: a UTF-8 byte is its own id. Nothing is trained, and any text comes back exactly."""

import numpy as np

from llmjax.core.errors import UserError
from llmjax.text.base import PLAIN, Base, Settings, Vocabulary

SPECIAL = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}


class Bytes(Base):
  """Ids 0 to 255 are bytes, then BOS, EOS and PAD.

  Args:
    model: empty; there is nothing to know.
    settings: chat template and the like.
  """

  kind = "bytes"

  def __init__(self, model: bytes = b"", settings: Settings = PLAIN):
    if model:
      raise UserError(f"a tokenizer of raw bytes has no model; {len(model)} bytes were given")
    super().__init__(b"", settings, Vocabulary(259, SPECIAL, *SPECIAL.values()))

  def _encode(self, text: str) -> list[int]:
    return list(text.encode())

  def _encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def _decode(self, ids: list[int]) -> str:
    known = np.asarray([i for i in ids if i < 256], np.uint8)
    return known.tobytes().decode(errors="replace")
