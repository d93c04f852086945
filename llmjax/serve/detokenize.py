"""New tokens as new text, piece by piece: decode(prompt + new) without decode(prompt). How a token
reads depends on those before it, so each is decoded together with those whose text was added last,
as vLLM does, and a text that ends within a character waits for the rest of it."""

import os
from bisect import bisect_left
from collections.abc import Sequence

from llmjax.text.tokenizer import Tokenizer

_BROKEN = "\ufffd"


class Detokenizer:
  """The text of one row's new tokens.

  Args:
    tokenizer: decodes.
    prompt: ids that stand before the new ones.
    stop: texts that end the row; the text is cut before the first of them.
  Attributes:
    text: the new text so far; whole characters alone, until `finish`.
    ids: its tokens; after a stop text those that `text` needs.
    stopped: whether a stop text was found.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
    self._decode, self._stop = tokenizer.decode, stop
    self._window, self._unread = list(prompt), 0  # the last `_unread` of the window are not in text
    self._before = self._decode(self._window)
    self._lengths, self._given = [], 0  # of `text` after each id; what `piece` has returned of it
    self.text, self.ids, self.stopped = "", [], False

  def add(self, ids: Sequence[int]):
    """Takes new tokens; what follows a stop text is left out."""
    for i in ids:
      if self.stopped:
        return
      self.ids.append(i)
      self._window.append(i)
      self._unread += 1
      decoded = self._decode(self._window)
      if not decoded.endswith(_BROKEN):
        self._extend(decoded)
      if not self.stopped:
        self._lengths.append(len(self.text))

  def finish(self):
    """Ends the text, with U+FFFD where the last character stayed incomplete."""
    if not self.stopped:
      self._extend(self._decode(self._window))
    self._stop = ()

  def piece(self) -> str:
    """What the text has gained since the last call and no stop text can take back."""
    starts = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
    held = 0 if self.stopped else max((len(s) for s in starts if self.text.endswith(s)), default=0)
    piece = self.text[self._given : len(self.text) - held]
    self._given += len(piece)
    return piece

  def _extend(self, decoded: str):
    """Adds what the window's text has more than before, and moves the window on."""
    new = decoded[len(os.path.commonprefix([self._before, decoded])) :]  # noqa: RUF071
    if not new:
      return  # special tokens alone: the next is still read after the text before them
    searched = len(self.text)
    self.text += new
    self._window, self._unread = self._window[-self._unread :], 0
    self._before = self._decode(self._window)
    found = [
      at for s in self._stop if (at := self.text.find(s, max(0, searched - len(s) + 1))) >= 0
    ]
    if found:
      self.stopped, self.text = True, self.text[: min(found)]
      self.ids = self.ids[: bisect_left(self._lengths, min(found)) + 1] if min(found) else []
