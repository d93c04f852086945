"""Arrays of a compiled program, with the source lines that made them: the largest, the replicated.

Between choosing shardings and partitioning, XLA's text has global shapes beside shardings; it is
written to a folder on request. What a `shard_map` computes by hand is not judged.
"""

import contextlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from llmjax.core.errors import UserError
from llmjax.parallel.hlo import computations, size_bytes, walk

MOST = 8  # arrays listed of a kind
_PASS = "after_shardy-xla.before_spmd-partitioning"
# As jax 0.10 has it, and 0.12: `{mesh['data'=8], replicated}`, or no axis on any dimension.
_REPLICATED = re.compile(r"sharding=\{(mesh\[[^\]]*\], )?(replicated|\[(\{\}(, )?)*\])\}")
# These hand on what other instructions made.
_PASSED_ON = (
  *("get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"),
  *("optimization-barrier", "copy-start", "async-start", "async-update"),
)
_GIVEN = ("parameter", "get-tuple-element", "tuple", "constant", "iota", "broadcast", "bitcast")


class Buffer(NamedTuple):
  """An array in a device's memory.

  Attributes:
    bytes: its size, without the padding of its layout.
    shape: type and shape, `f32[16,64,64]`.
    operation: an argument's path, or jax's name of what made the array.
    source: file and line of the innermost call outside of installed packages; "" if unknown.
  """

  bytes: int
  shape: str
  operation: str
  source: str


class ReplicatedArray(Buffer):
  """An array that every device would hold complete."""


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
    source, shape = frames.source_of(op), op.shape.partition("{")[0]
    name = (argument or run.origin or op.code).replace("\\'", "'")
    found.setdefault((shape, source, argument), Buffer(size_bytes(shape), shape, name, source))
  known = {shape for shape, source, _ in found if source}
  given, made = [], []
  for (shape, source, argument), one in found.items():
    if argument or source or shape not in known:
      (given if argument else made).append(one)
  ranked = (sorted(kind, key=lambda one: -one.bytes)[:most] for kind in (given, made))
  both = sorted(itertools.chain(*ranked), key=lambda one: -one.bytes)
  return [one for one in both if 1000 * one.bytes >= both[0].bytes]


def compile_and_watch(lowered, limit_bytes: int, options: dict | None = None):
  """Compiles a program and lists the arrays that it would replicate on every device.

  Args:
    lowered: of `jax.jit(…).lower(…)`, for a mesh.
    limit_bytes: smaller arrays are not listed.
    options: XLA's options.
  Returns:
    (compiled, list of `ReplicatedArray`, each line of source once, the largest first).
  Raises:
    UserError: this XLA does not write the text that is read here.
  """
  with tempfile.TemporaryDirectory() as folder, no_cache():
    dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partition.*|shardy.*"}
    compiled = lowered.compile(compiler_options={**(options or {}), **dump})
    texts = [path.read_text() for path in Path(folder).glob(f"*{_PASS}*.txt")]
  if not texts:
    raise UserError("XLA wrote no text before partitioning: replicated arrays cannot be found")
  found = {}
  for text in texts:
    for array in sorted(replicated_arrays(text, limit_bytes), key=lambda array: -array.bytes):
      found.setdefault(array.source or array.operation, array)
  return compiled, list(found.values())


def replicated_arrays(text: str, limit_bytes: int) -> Iterator[ReplicatedArray]:
  """Reads a program's text before it is partitioned; see `compile_and_watch`."""
  frames = Frames(text)
  for op in itertools.chain(*(body.values() for body in computations(text)[0].values())):
    sharded = "sharding={" in op.attributes and not _REPLICATED.search(op.attributes)
    if op.code in _GIVEN or sharded or op.shape.startswith("(") or "[]" in op.shape:
      continue
    shape = op.shape.partition("{")[0]
    if (size := size_bytes(shape)) >= limit_bytes:
      name = op.find(r'op_name="([^"]*)"') or op.code
      yield ReplicatedArray(size, shape, name, frames.source_of(op))


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

  def source_of(self, op) -> str:
    """The first caller of an instruction that is not in an installed package; "" if unknown."""
    frame = int(op.find(r"stack_frame_id=(\d+)") or 0)
    while frame:
      entry = self.frames[frame - 1]
      location = self.locations[entry["file_location_id"] - 1]
      file = self.files[location["file_name_id"] - 1]
      if "site-packages" not in file:
        return f"{file}:{location['line']}"
      frame = entry["parent_frame_id"] - 1  # counted from one past the root
    return ""


@contextlib.contextmanager
def no_cache():
  """Turns jax's compilation cache off: a program found there is not compiled and writes nothing."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it asks once whether it is wanted
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
