"""The largest arrays of a compiled program, with the lines of source that made them."""

from typing import NamedTuple

from llmjax.parallel.hlo import size_bytes, walk
from llmjax.parallel.whole import Frames

MOST = 12  # arrays listed

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
    most: how many.
  Returns:
    Arguments and what is made, the largest first.
  """
  frames, found = Frames(hlo_text), {}
  for op, _, _, origin, fused, _ in walk(hlo_text):
    argument = op.code == "parameter" and op.find(r'op_name="([^"]*)"')
    unnamed = op.code in ("parameter", *_PASSED_ON) or op.code.endswith("-done")
    if fused or op.shape.startswith("(") or "S(" in op.shape or (unnamed and not argument):
      continue
    frame = op.find(r"stack_frame_id=(\d+)")
    source = frames.source(int(frame)) if frame else ""
    shape = op.shape.partition("{")[0]
    one = Buffer(size_bytes(shape), shape, argument or origin or op.code, source)
    found.setdefault((shape, argument or source), one)
  known = {shape for shape, place in found if place}
  kept = [one for (shape, place), one in found.items() if place or shape not in known]
  return sorted(kept, key=lambda one: -one.bytes)[:most]
