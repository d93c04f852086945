"""The collectives of a compiled program: which mesh axes they run along, how many bytes, how often.

XLA decides what a sharded program sends, and only its optimized text says so. Here that text is
read: a test can hold a budget of bytes against it, a plan can print what a step will send.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from llmjax.core.errors import UserError

KINDS = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
_CALLERS = ("call", "fusion", "conditional", "async-start", "custom-call")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(")
_OP = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$")
_GROUPS = re.compile(
  r"(?:replica_groups|source_target_pairs)=(?:(?P<list>\{\{.*?\}\})|"
  r"\[(?P<to>[\d,]+)\]<=(?P<ids>\[[^ ]+)|"
  r"mesh\[(?P<mesh>.*?)\](?:, device_ids=\((?P<mesh_ids>.*?)\))? \{(?P<axes>.*?)\})"
)
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction of a program, at one place it is called from.

  Attributes:
    kind: one of `KINDS`, whether it runs asynchronously or not.
    axes: mesh axes its groups run along, in the mesh's order; `("?",)` if no set of axes fits.
    bytes: what a device holds of the whole, see `collectives`.
    count: executions in one run of the program, the product of its loops' trip counts.
    dtype: XLA's name of the (first) operand's type, such as `bf16`.
    op_name: JAX's name of what made it, "" if the program does not say.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  count: int
  dtype: str
  op_name: str


@dataclasses.dataclass(frozen=True)
class _Op:
  root: bool
  name: str
  shape: str
  code: str
  inside: str  # between the parentheses
  attributes: str

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.-]+)", self.inside)

  def find(self, pattern: str) -> str:
    found = re.search(pattern, self.attributes)
    return found[1] if found else ""


def collectives(hlo_text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
  """Reads every collective out of a compiled program's text.

  Bytes are those of the array that is whole on a device, unpadded by layouts: an all-gather's
  result; the operand of an all-reduce, reduce-scatter, all-to-all or permute; of a combined one the
  sum. A loop whose trip count cannot be read counts once, and so does every branch of a
  conditional. A permute's axes are all those that any of its pairs crosses. Groups of one device
  send nothing and are left out, and so are sends, receives and custom calls.

  What XLA makes of a program differs by backend. The CPU's widens bf16 to fp32, sends an all-to-all
  as a tuple of slices, keeps an explicit reduce-scatter, but never makes one of an all-reduce. The
  TPU's makes them, as fusions of an all-reduce with a slice: these are reported as reduce-scatters.
  It also turns gathers and scatters beside a product into loops of permutes, and cuts others into
  fusions of one chain that overlap with products: a chain counts once.

  Args:
    hlo_text: `compiled.as_text()` of a function jitted over the mesh.
    mesh: that mesh; partition number i is the i-th of its devices in row-major order.
  Returns:
    One `Collective` for each instruction and place it is called from, in the program's order.
  Raises:
    UserError: the program is for another number of devices, or the text has no entry computation.
  """
  partitions = re.search(r"^HloModule .*?num_partitions=(\d+)", hlo_text)
  if partitions and int(partitions[1]) != mesh.size:
    raise UserError(f"the program is for {partitions[1]} devices, the mesh has {mesh.size}")
  computations, entry = _parse(hlo_text)
  found = []
  for kind, op, body, count, source in _walk(computations, entry, 1):
    groups = _groups(op, mesh.size)
    axes = _axes(groups, mesh, whole=kind != "collective-permute")
    if not axes:
      continue
    first = 1 if kind == "ragged-all-to-all" else None  # its others say where rows go
    shapes = [body[name].shape for name in op.operands[:first]]
    size = sum(map(_bytes, shapes)) * (len(groups[0]) if kind == "all-gather" else 1)
    dtype = re.match(r"\(*(\w+)", shapes[0])[1]
    found.append(Collective(kind, axes, size, count, dtype, source))
  return found


def summary(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
  """Adds up bytes × count for each (kind, axes)."""
  totals = Counter()
  for one in found:
    totals[one.kind, one.axes] += one.bytes * one.count
  return dict(totals)


def describe(found: list[Collective]) -> str:
  """Formats a summary for people: `all-gather fsdp 1.2 MB ×8, all-reduce data 300.0 kB`.

  Returns:
    For each kind and axes the mean bytes of an execution and their number, most bytes first.
  """
  parts = []
  for (kind, axes), total in Counter(summary(found)).most_common():
    count = sum(one.count for one in found if (one.kind, one.axes) == (kind, axes))
    times = f" ×{count:,}" if count > 1 else ""
    parts.append(f"{kind} {'+'.join(axes)} {_human(total / count)}{times}")
  return ", ".join(parts) or "no collectives"


def _human(size_bytes: float) -> str:
  for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if size_bytes >= scale:
      return f"{size_bytes / scale:.1f} {unit}"
  return f"{size_bytes:.0f} B"


def _parse(text: str) -> tuple[dict[str, dict[str, _Op]], str]:
  """Splits a program into its computations, each a dict of instructions, and names the entry."""
  computations, entry, body = {}, None, {}
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      body = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif op := _OP.match(line):
      body[op[2]] = _Op(bool(op[1]), *op.groups("")[1:])
  if entry is None:
    raise UserError("a compiled program's text was expected, with an ENTRY computation; none there")
  return computations, entry


def _walk(computations, name, count, source="", chains=None) -> Iterator[tuple]:
  """Yields (kind, instruction, its computation, executions, op_name) of every collective reached.

  In a fusion, `chains` holds the overlapped collectives already met in the fusions beside it.
  """
  body, fused = computations[name], chains is not None
  chains = chains if fused else set()
  for op in body.values():
    origin = op.find(r'op_name="([^"]*)"') or source
    kind = op.code.removesuffix("-start")
    if kind in KINDS:
      chain = op.find(r'chain_id="(\d+)"')
      if chain not in chains:
        yield "reduce-scatter" if fused and _is_sliced(op, body) else kind, op, body, count, origin
      chains.update([chain] if chain else [])
    elif op.code == "while":
      inner = [op.find(rf"{part}=%([\w.-]+)") for part in ("condition", "body")]
      trips = _trips(op, body, *(computations[part] for part in inner))
      for part in inner:
        yield from _walk(computations, part, count * trips, origin)
    elif op.code in _CALLERS:
      for part in re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(op.attributes))):
        beside = chains if op.code == "fusion" else None
        yield from _walk(computations, part, count, origin, beside)


def _is_sliced(op: _Op, body: dict[str, _Op]) -> bool:
  """Whether each device keeps but a slice of what `op` sums, as in `all-reduce-scatter` fusions."""
  return op.code == "all-reduce" and any(
    other.code == "dynamic-slice" and other.operands[0] == op.name for other in body.values()
  )


def _trips(loop: _Op, outside, condition, body) -> int:
  """Reads a loop's trip count: as XLA noted it, or from counter, start, step and limit; else 1."""
  if known := loop.find(r'known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  test, last = (next(op for op in part.values() if op.root) for part in (condition, body))
  if test.code != "compare" or test.find(r"direction=(LT|GT|NE)") == "":
    return 1
  index = _origin(condition, test.operands[0]).find(r"index=(\d+)")
  limit = _constant(condition, test.operands[1])
  if limit is None or not index or last.code != "tuple":
    return 1
  step = _added(body, last.operands[int(index)], index)
  before = outside[loop.operands[0]]
  start = _constant(outside, before.operands[int(index)]) if before.code == "tuple" else None
  return len(range(start or 0, limit, step)) if step else 1


def _origin(body: dict[str, _Op], name: str) -> _Op:
  """Follows copies back to the instruction whose value they hold."""
  while body[name].code in ("copy", "copy-start", "copy-done", "bitcast", "convert"):
    name = body[name].operands[0]
  return body[name]


def _constant(body: dict[str, _Op], name: str) -> int | None:
  op = _origin(body, name)
  return int(op.inside) if op.code == "constant" and re.fullmatch(r"-?\d+", op.inside) else None


def _added(body: dict[str, _Op], name: str, index: str) -> int:
  """The sum of the constants added to element `index` of a loop's state to make `name`; or 0."""
  op, total = _origin(body, name), 0
  while op.code == "add" and (amount := _constant(body, op.operands[1])) is not None:
    op, total = _origin(body, op.operands[0]), total + amount
  return total if op.code == "get-tuple-element" and op.find(r"index=(\d+)") == index else 0


def _groups(op: _Op, devices: int) -> list[list[int]]:
  """The groups of partitions an instruction runs over; of a permute the pairs."""
  written = _GROUPS.search(op.attributes)
  if written is None and op.find(r"(replica_groups=|source_target_pairs=)(?!\{\})"):
    raise UserError(f"{op.name}: replica groups of a form not known: {op.attributes[:100]}")
  if written is None:
    return [] if op.find("(source_target_pairs)") else [list(range(devices))]
  if written["list"]:
    return [_numbers(group) for group in written["list"].split("},{")]
  if written["to"]:
    return _order(written["ids"]).reshape(_numbers(written["to"])).tolist()
  sizes = {name: int(size) for name, size in re.findall(r"(\w+)'?=(\d+)", written["mesh"])}
  ids = _order(written["mesh_ids"] or f"[{devices}]")
  return _named_groups(sizes, ids, written["axes"])


def _named_groups(sizes: dict[str, int], ids: np.ndarray, axes: str) -> list[list[int]]:
  """Groups along axes of a mesh XLA made up: `mesh['a'=4,'b'=2] {'a':(1)2}`, (before)size or all.

  Devices of a group differ only in their coordinates along those axes, or parts of them.
  """
  cells = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
  for name, before, part in re.findall(r"(\w+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes):
    row, size = cells[list(sizes).index(name)], int(part or sizes[name])
    after = sizes[name] // (int(before or 1) * size)
    row -= row // after % size * after
  groups = defaultdict(list)
  for device, cell in zip(ids.tolist(), cells.T.tolist(), strict=True):
    groups[tuple(cell)].append(device)
  return list(groups.values())


def _order(text: str) -> np.ndarray:
  """Partition ids listed as `0,2,1,3` or as the transposed iota `[2,2]T(1,0)`, in one row."""
  if not (counted := re.match(r"\[([\d,]+)\](?:T\((.*?)\))?", text)):
    return np.array(_numbers(text))
  sizes = _numbers(counted[1])
  turn = _numbers(counted[2]) if counted[2] else range(len(sizes))
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(*turn).reshape(-1)


def _axes(groups: list[list[int]], mesh: Mesh | AbstractMesh, whole: bool) -> tuple[str, ...]:
  """The mesh axes along which groups run; () if nobody has company.

  With `whole` the groups must each be all devices along these axes and together the mesh.
  """
  sizes = tuple(mesh.shape.values())
  moves = np.zeros(len(sizes), bool)
  for group in groups:
    cells = np.stack(np.unravel_index(group, sizes))
    moves |= (cells != cells[:, :1]).any(1)
  axes = tuple(name for name, moved in zip(mesh.axis_names, moves, strict=True) if moved)
  ways = math.prod(mesh.shape[name] for name in axes)
  full = all(len(group) == ways for group in groups) and ways * len(groups) == mesh.size
  return axes if full or not whole or not axes else ("?",)


def _bytes(shape: str) -> int:
  """Bytes of an array or tuple written `bf16[8,128]{1,0:T(8,128)(2,1)}`, without padding."""
  size = 0
  for dtype, dims in re.findall(r"([a-z]\w*)\[([^\]]*)\]", shape):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+|$", dtype)[0] or 0)
    size += math.ceil(math.prod(_numbers(dims)) * bits / 8)
  return size


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
