"""The collectives of a compiled program: which mesh axes they run along, how many bytes, how often.

XLA decides what a sharded program sends, and only its optimized text says so.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from llmjax.core.errors import UserError
from llmjax.parallel.hlo import Op, Run, numbers, size_bytes, walk

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
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
    bytes: of the array that it makes or reads, see `collectives`.
    count: executions in one run of the program, the product of its loops' trip counts.
    shards: devices of a group; slices, if it runs between them.
    links: of a device that it keeps busy, one way each: as the TPU's compiler notes of its rings,
      else 2, a ring along one dimension both ways; of a permute 1.
    dcn: whether it runs between slices.
    start: the place in the program's order, as `walk` counts it, where it begins.
    done: where it must have ended; what stands between may run beside it.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  count: int = 1
  shards: int = 1
  links: int = 2
  dcn: bool = False
  start: int = 0
  done: int = 0

  @property
  def overlapped(self) -> bool:
    """Whether anything stands between its start and its end."""
    return self.done > self.start


def collectives(
  hlo_text: str, mesh: Mesh | AbstractMesh, slices: int = 1, across: str = "data"
) -> list[Collective]:
  """Reads every collective out of a compiled program's text.

  Bytes are those of an all-gather's result; of the operand of an all-reduce, reduce-scatter,
  all-to-all or permute, unpadded by layouts; of a combined one the sum; of a ragged all-to-all no
  more than either side has a buffer for. Every branch of a conditional counts once. A permute's
  axes are those that any of its pairs crosses. Groups of one device send nothing and are left out,
  as custom calls are.

  For several slices the TPU's compiler makes the program of one, which all of them run: its groups
  are of a slice's devices, and what goes to other slices is sent by its host. Each such transfer is
  a collective along `across` of a group with a device in every slice.

  XLA's CPU backend widens bf16 to fp32 and never makes a reduce-scatter of an all-reduce. The TPU's
  does, as fusions of an all-reduce with a slice: these are reported as reduce-scatters. It also
  turns gathers and scatters beside a product into loops of permutes, and splits others into fusions
  of one chain that overlap with products: a chain counts once.

  Args:
    hlo_text: `compiled.as_text()` of a function jitted over the mesh.
    mesh: that mesh; partition number i is the i-th of its devices, or of a slice's, in row-major
      order.
    slices: that the mesh is made of.
    across: the axis along which slices follow each other.
  Returns:
    One `Collective` for each instruction and place it is called from, in the program's order.
  Raises:
    UserError: the program is for another number of devices, or the text has no entry computation.
  """
  sizes = dict(mesh.shape)
  sizes[across] = sizes.get(across, 1) // slices
  inner = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  partitions = re.search(r"^HloModule .*?num_partitions=(\d+)", hlo_text)
  if partitions and int(partitions[1]) != inner.size:
    whose = "a slice of the mesh" if slices > 1 else "the mesh"
    raise UserError(f"the program is for {partitions[1]} devices, {whose} has {inner.size}")
  found = []
  for kind, run, start, done in _executed(hlo_text):
    dcn = run.op.code == "send"
    groups = [] if dcn else _groups(run.op, inner.size)
    axes = (across,) if dcn else _axes(groups, inner, complete=kind != "collective-permute")
    if not axes:
      continue
    shards = slices if dcn else len(groups[0])
    shapes = [run.body[name].shape for name in run.op.operands]
    if kind == "ragged-all-to-all":
      shapes = [min(shapes[:2], key=size_bytes)]  # the buffers on either side; others say where
    size = sum(map(size_bytes, shapes)) * (shards if kind == "all-gather" else 1)
    links = _links(kind, run.op)
    found.append(Collective(kind, axes, size, run.count, shards, links, dcn, start, done))
  return found


def summary(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
  """Adds up bytes × count for each (kind, axes)."""
  totals = Counter()
  for one in found:
    totals[one.kind, one.axes] += one.bytes * one.count
  return dict(totals)


def describe(found: Sequence[Collective]) -> str:
  """Formats a summary for people: `all-gather fsdp 1.20 GiB in 8, all-reduce data 3.00 KiB`.

  Returns:
    For each kind and axes the bytes of all executions and their number, most bytes first.
  """
  parts = []
  for (kind, axes), total in Counter(summary(found)).most_common():
    count = sum(one.count for one in found if (one.kind, one.axes) == (kind, axes))
    times = f" in {count:,}" if count > 1 else ""
    parts.append(f"{kind} {'+'.join(axes)} {show_bytes(total)}{times}")
  return ", ".join(parts) or "no collectives"


def show_bytes(size: float) -> str:
  """Formats a size in GiB, MiB or KiB."""
  unit, name = next(each for each in _UNITS if size >= each[0] or each[0] == 2**10)
  return f"{size / unit:,.2f} {name}"


def _executed(hlo_text: str) -> list[list]:
  """Lists [kind, `Run`, start, done] of every collective; of an overlapped chain of them one."""
  listed, begun, wrapper = [], {}, None
  for place, run in enumerate(walk(hlo_text)):
    kind, key = _kind(run), _key(run, run.op)
    if wrapper and run.beside == wrapper[0]:
      wrapper = None  # what it calls has a number of its own
    if run.op.code == "async-start":
      wrapper = key
    elif run.op.code.endswith("-done") and run.op.code != "send-done":
      before = run.body[run.op.operands[0]]
      while before.code.endswith("-update"):
        before = run.body[before.operands[0]]
      if (key := _key(run, before)) in begun:
        begun[key][-1] = place
    elif kind and key in begun:
      begun[key][-1] = place
    elif kind:
      begun[key] = begun[wrapper] = [kind, run, place, place]
      listed.append(begun[key])
  return listed


def _kind(run: Run) -> str:
  """One of `KINDS`; "" of what is no collective."""
  if run.op.code == "send":
    kind = run.op.find(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    return "collective-permute" if kind == "one-to-one" else kind
  kind = run.op.code.removesuffix("-start")
  sliced = run.fused and kind in KINDS and _is_sliced(run.op, run.body)
  return "reduce-scatter" if sliced else kind if kind in KINDS else ""


def _key(run: Run, op: Op) -> tuple:
  """What the instructions of one collective share: a chain, a meeting of hosts, else its name."""
  return run.beside, op.find(r'(?:chain_id|_rendezvous)="([^"]+)"') or op.name


def _links(kind: str, op: Op) -> int:
  """Reads how many rings there are, one way or both: `UniDirectionNDRingStrategy{colors:4 ...`."""
  rings = op.find(r'"strategy":"[^}]*?colors:(\d+)')
  one_way = "UniDirection" in op.find(r'"strategy":"(\w+)')
  return int(rings) * (1 if one_way else 2) if rings else 1 if kind == "collective-permute" else 2


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
  """Groups along axes of a mesh of XLA's: `mesh['a'=4,'b'=2] {'a':(1)2}`, (before)size or all."""
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


def _axes(groups: list[list[int]], mesh: Mesh | AbstractMesh, complete: bool) -> tuple[str, ...]:
  """The axes along which groups run; with `complete` they must be all devices along these."""
  sizes = tuple(mesh.shape.values())
  moves = np.zeros(len(sizes), bool)
  for group in groups:
    cells = np.stack(np.unravel_index(group, sizes))
    moves |= (cells != cells[:, :1]).any(1)
  axes = tuple(name for name, moved in zip(mesh.axis_names, moves, strict=True) if moved)
  shards = math.prod(mesh.shape[name] for name in axes)
  full = all(len(group) == shards for group in groups) and shards * len(groups) == mesh.size
  return axes if full or not complete or not axes else ("?",)
