"""The largest arrays of a compiled program, with the lines of source that made them."""

import itertools
from typing import NamedTuple

from llmjax.parallel.hlo import size_bytes, walk
from llmjax.parallel.whole import Frames

MOST = 8  # arrays listed of a kind

# These make nothing: what they hand on was made elsewhere.
_PASSED_ON = (
  *("get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"),
  *("optimization-barrier", "copy-start", "async-start", "async-update"),
)


class Buffer(NamedTuple):
  """An array in a device's memory.

  Attributes:
    bytes: its size, unpadded where the program's text says it.
    shape: type and shape.
    operation: an argument's path, or jax's words for what made the array.
    source: file and line of the innermost call outside of installed packages; "" if unknown.
  """

  bytes: int
  shape: str
  operation: str
  source: str


def largest_buffers(hlo_text: str, most: int = MOST) -> list[Buffer]:
  """Lists a program's largest arrays in main memory, each shape and line once.

  Which of them live at the same time the text does not say.

  Args:
    hlo_text: optimized HLO.
    most: how many of the program's arguments, and of what it makes.
  Returns:
    Both, the largest first; none that is less than a thousandth of it.
  """
  frames, found = Frames(hlo_text), {}
  for run in walk(hlo_text):
    op = run.op
    argument = op.find(r'op_name="([^"]*)"') if op.code == "parameter" else ""
    unnamed = op.code in ("parameter", *_PASSED_ON) or op.code.endswith("-done")
    if run.fused or op.shape.startswith("(") or "S(" in op.shape or (unnamed and not argument):
      continue
    frame = op.find(r"stack_frame_id=(\d+)")
    source = frames.source(int(frame)) if frame else ""
    shape = op.shape.partition("{")[0]
    name = (argument or run.origin or op.code).replace("\\'", "'")
    one = Buffer(size_bytes(shape), shape, name, source)
    found.setdefault((shape, source, argument), one)
  known = {shape for shape, source, _ in found if source}
  given, made = [], []
  for (shape, source, argument), one in found.items():
    if argument or source or shape not in known:
      (given if argument else made).append(one)
  ranked = (sorted(kind, key=lambda one: -one.bytes)[:most] for kind in (given, made))
  both = sorted(itertools.chain(*ranked), key=lambda one: -one.bytes)
  return [one for one in both if 1000 * one.bytes >= both[0].bytes]
