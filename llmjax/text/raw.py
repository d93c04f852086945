"""Raw bytes: a UTF-8 byte is its own id. Nothing is trained, and any text comes back exactly."""

from llmjax.core.errors import UserError
from llmjax.text.base import PLAIN, Settings, Tokenizer

SPECIAL = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}


class Bytes(Tokenizer):
  """Ids 0 to 255 are bytes, then BOS, EOS and PAD."""

  kind = "bytes"

  def __init__(self, model: bytes = b"", settings: Settings = PLAIN):
    if model:
      raise UserError(f"a tokenizer of raw bytes has no model; {len(model)} bytes were given")
    super().__init__(b"", settings, 259, SPECIAL)

  def _encode(self, text: str) -> list[int]:
    return list(text.encode())

  def _decode(self, ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")
