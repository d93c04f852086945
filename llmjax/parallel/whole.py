"""Activations that a program would hold whole on every device, with the line that made each.

Between choosing shardings and cutting arrays up, XLA's text has whole shapes beside shardings; it
is written to a folder when asked. What a `shard_map` computes by hand is not judged.
"""

import contextlib
import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from llmjax.core.errors import UserError

_PASS = "after_shardy-xla.before_spmd-partitioning"
_ARRAY = re.compile(
  r"\s+(?:ROOT )?%\S+ = (?P<type>[a-z]+(?P<bits>\d*))\[(?P<dims>[\d,]+)\]\S* (?P<code>[\w-]+)\("
)
# As jax 0.10 has it, and 0.12: `{mesh['data'=8], replicated}`, or no axis on any dimension.
_WHOLE = re.compile(r"sharding=\{(mesh\[[^\]]*\], )?(replicated|\[(\{\}(, )?)*\])\}")
# These make nothing: what they hand on was judged where it was made, or is an input.
_PASSED_ON = ("parameter", "get-tuple-element", "tuple", "constant", "iota", "broadcast", "bitcast")


@dataclasses.dataclass(frozen=True)
class ReplicatedArray:
  """An array that every device would hold whole.

  Attributes:
    shape: its type and shape, `f32[16,64,64]`.
    bytes: its size.
    operation: what made it, in jax's words.
    source: file and line of the innermost call outside of installed packages; "" if unknown.
  """

  shape: str
  bytes: int
  operation: str
  source: str


def compile_and_watch(lowered, limit_bytes: int, options: dict | None = None):
  """Compiles a program and lists what it would hold whole on every device.

  Args:
    lowered: of `jax.jit(…).lower(…)`, for a mesh.
    limit_bytes: smaller arrays are not listed.
    options: XLA's options.
  Returns:
    (compiled, list of `Whole`, each line of source once, the largest first).
  Raises:
    UserError: this XLA does not write the text that is read here.
  """
  with tempfile.TemporaryDirectory() as folder, no_cache():
    dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partition.*|shardy.*"}
    compiled = lowered.compile(compiler_options={**(options or {}), **dump})
    texts = [path.read_text() for path in Path(folder).glob(f"*{_PASS}*.txt")]
  if not texts:
    raise UserError("XLA wrote no text before partitioning: arrays held whole cannot be looked for")
  found = {}
  for text in texts:
    for array in sorted(whole_arrays(text, limit_bytes), key=lambda array: -array.bytes):
      found.setdefault(array.source or array.operation, array)
  return compiled, list(found.values())


def whole_arrays(text: str, limit_bytes: int) -> Iterator[ReplicatedArray]:
  """Reads a program's text before it is partitioned; see `compile_and_watch`."""
  frames = Frames(text)
  for line in text.splitlines():
    array = _ARRAY.match(line)
    cut = "sharding={" in line and not _WHOLE.search(line)
    if not array or array["code"] in _PASSED_ON or cut:
      continue
    size_bytes = math.prod(map(int, array["dims"].split(","))) * int(array["bits"] or 8) // 8
    if size_bytes >= limit_bytes:
      name = re.search(r'op_name="([^"]*)"', line)
      frame = re.search(r"stack_frame_id=(\d+)", line)
      yield ReplicatedArray(
        f"{array['type']}[{array['dims']}]",
        size_bytes,
        name[1] if name else array["code"],
        frames.source(int(frame[1])) if frame else "",
      )


class Frames:
  """The tables of source lines at a program's head."""

  def __init__(self, text: str):
    tables = []
    for name in ("FileNames", "FileLocations", "StackFrames"):
      table = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
      tables.append(table[1].splitlines() if table else [])
    self.files = [row.split('"')[1] for row in tables[0]]
    self.locations, self.frames = (
      [{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)} for row in table]
      for table in tables[1:]
    )

  def source(self, frame: int) -> str:
    """Climbs from a frame to the first caller that is not in an installed package."""
    while frame:
      entry = self.frames[frame - 1]
      place = self.locations[entry["file_location_id"] - 1]
      file = self.files[place["file_name_id"] - 1]
      if "site-packages" not in file:
        return f"{file}:{place['line']}"
      frame = entry["parent_frame_id"] - 1  # counted from one past the root
    return ""


@contextlib.contextmanager
def no_cache():
  """A program found in the cache is not compiled, and writes nothing."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it asks once whether it is wanted
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
