"""The collectives of a compiled program: which mesh axes they run along, how many bytes, how often.

XLA decides what a sharded program sends, and only its optimized text says so. Here that text is
read: a test can hold a budget of bytes against it, a plan can print what a step will send.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from llmjax.core.errors import UserError
from llmjax.parallel.hlo import Op, numbers, size_bytes, walk

KINDS = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
_GROUPS = re.compile(
  r"(?:replica_groups|source_target_pairs)=(?:(?P<list>\{\{.*?\}\})|"
  r"\[(?P<to>[\d,]+)\]<=(?P<ids>\[[^ ]+)|"
  r"mesh\[(?P<mesh>.*?)\](?:, device_ids=\((?P<mesh_ids>.*?)\))? \{(?P<axes>.*?)\})"
)


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
    overlapped: whether other work runs while it does.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  count: int
  dtype: str
  op_name: str
  overlapped: bool = False


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
  found = []
  for kind, run in _executed(hlo_text):
    groups = _groups(run.op, mesh.size)
    axes = _axes(groups, mesh, whole=kind != "collective-permute")
    if not axes:
      continue
    first = 1 if kind == "ragged-all-to-all" else None  # its others say where rows go
    shapes = [run.body[name].shape for name in run.op.operands[:first]]
    size = sum(map(size_bytes, shapes)) * (len(groups[0]) if kind == "all-gather" else 1)
    dtype = re.match(r"\(*(\w+)", shapes[0])[1]
    beside = run.op.code.endswith("-start") or bool(run.op.find("(async_collective_name|chain_id)"))
    found.append(Collective(kind, axes, size, run.count, dtype, run.origin, beside))
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


def _executed(hlo_text: str):
  """Yields (kind, `Run`) of every collective; of an overlapped chain of them one."""
  met = set()
  for run in walk(hlo_text):
    kind = run.op.code.removesuffix("-start")
    if kind in KINDS:
      chain = run.beside, run.op.find(r'chain_id="(\d+)"')
      if chain not in met:
        yield "reduce-scatter" if run.fused and _is_sliced(run.op, run.body) else kind, run
      met.update([chain] if chain[1] else [])


def _is_sliced(op: Op, body: dict[str, Op]) -> bool:
  """Whether each device keeps but a slice of what `op` sums, as in `all-reduce-scatter` fusions."""
  return op.code == "all-reduce" and any(
    other.code == "dynamic-slice" and other.operands[0] == op.name for other in body.values()
  )


def _groups(op: Op, devices: int) -> list[list[int]]:
  """The groups of partitions an instruction runs over; of a permute the pairs."""
  written = _GROUPS.search(op.attributes)
  if written is None and op.find(r"(replica_groups=|source_target_pairs=)(?!\{\})"):
    raise UserError(f"{op.name}: replica groups of a form not known: {op.attributes[:100]}")
  if written is None:
    return [] if op.find("(source_target_pairs)") else [list(range(devices))]
  if written["list"]:
    return [numbers(group) for group in written["list"].split("},{")]
  if written["to"]:
    return _order(written["ids"]).reshape(numbers(written["to"])).tolist()
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
    return np.array(numbers(text))
  sizes = numbers(counted[1])
  turn = numbers(counted[2]) if counted[2] else range(len(sizes))
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
