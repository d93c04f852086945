"""A compiled program's text: its instructions, how often each runs, how large its arrays are."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from llmjax.core.errors import UserError

_CALLERS = ("call", "fusion", "conditional", "async-start", "custom-call")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(")
_OP = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$")
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction.

  Attributes:
    root: whether its computation returns it.
    name: its own.
    shape: of its result, as written.
    code: what it does.
    inside: what stands between the parentheses.
    attributes: what stands behind them.
  """

  root: bool
  name: str
  shape: str
  code: str
  inside: str
  attributes: str

  @property
  def operands(self) -> list[str]:
    """Names of what it reads."""
    return re.findall(r"%([\w.-]+)", self.inside)

  def find(self, pattern: str) -> str:
    """The first group of a pattern in its attributes; "" if there is none."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ""


class Run(NamedTuple):
  """An instruction that a program runs.

  Attributes:
    op: the instruction.
    body: its computation.
    count: executions.
    origin: jax's name of what made it, or of what called it.
    fused: whether it is a part of a fusion.
    beside: number of the visit to its computation, or to that of the fusion: what has the same
      number runs side by side.
    path: the branches of conditionals that it stands in, outermost first: (visit, name, branch).
  """

  op: Op
  body: dict[str, Op]
  count: int
  origin: str
  fused: bool
  beside: int
  path: tuple


def walk(hlo_text: str) -> Iterator[Run]:
  """Yields every instruction that a program runs.

  A loop whose trip count cannot be read counts once, and so does every branch of a conditional.

  Args:
    hlo_text: `compiled.as_text()`.
  Yields:
    A `Run` for each instruction and place it is called from, in the program's order.
  Raises:
    UserError: the text has no entry computation.
  """
  bodies, entry = computations(hlo_text)
  yield from _visit(bodies, entry, 1, "", itertools.count())


def computations(hlo_text: str) -> tuple[dict[str, dict[str, Op]], str]:
  """Parses a program's text: (by a computation's name its instructions by name, the entry's name).

  Raises:
    UserError: the text has no entry computation.
  """
  found, entry, body = {}, None, {}
  for line in re.sub(r'\n(?="|}})', "", hlo_text).splitlines():  # a kernel's notes have lines
    if head := _COMPUTATION.match(line):
      body = found[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif op := _OP.match(line):
      body[op[2]] = Op(bool(op[1]), *op.groups("")[1:])
  if entry is None:
    raise UserError("a compiled program's text was expected, with an ENTRY computation; none there")
  return found, entry


def _visit(computations, name, count, source, visits, path=(), fusion=None) -> Iterator[Run]:
  """`fusion` is the number of the visit to the computation that it stands in, if it is one."""
  body, beside = computations[name], next(visits) if fusion is None else fusion
  for op in body.values():
    origin = op.find(r'op_name="([^"]*)"') or source
    yield Run(op, body, count, origin, fusion is not None, beside, path)
    if op.code == "while":
      inner = [op.find(rf"{part}=%([\w.-]+)") for part in ("condition", "body")]
      trips = _trips(op, body, *(computations[part] for part in inner))
      for part in inner:
        yield from _visit(computations, part, count * trips, origin, visits, path)
    elif op.code in _CALLERS:
      within = beside if op.code == "fusion" else None
      called = re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(op.attributes)))
      for number, part in enumerate(called):
        way = (*path, (beside, op.name, number)) if op.code == "conditional" else path
        yield from _visit(computations, part, count, origin, visits, way, within)


def _trips(loop: Op, outside, condition, body) -> int:
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


def _origin(body: dict[str, Op], name: str) -> Op:
  """Follows copies back to the instruction whose value they hold."""
  while body[name].code in ("copy", "copy-start", "copy-done", "bitcast", "convert"):
    name = body[name].operands[0]
  return body[name]


def _constant(body: dict[str, Op], name: str) -> int | None:
  op = _origin(body, name)
  return int(op.inside) if op.code == "constant" and re.fullmatch(r"-?\d+", op.inside) else None


def _added(body: dict[str, Op], name: str, index: str) -> int:
  """The sum of the constants added to element `index` of a loop's state to make `name`; or 0."""
  op, total = _origin(body, name), 0
  while op.code == "add" and (amount := _constant(body, op.operands[1])) is not None:
    op, total = _origin(body, op.operands[0]), total + amount
  return total if op.code == "get-tuple-element" and op.find(r"index=(\d+)") == index else 0


def size_bytes(shape: str) -> int:
  """Bytes of an array or tuple written `bf16[8,128]{1,0:T(8,128)(2,1)}`, without padding."""
  size = 0
  for dtype, dims in re.findall(r"([a-z]\w*)\[([^\]]*)\]", shape):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+|$", dtype)[0] or 0)
    size += math.ceil(math.prod(numbers(dims)) * bits / 8)
  return size


def dims(shape: str) -> list[int]:
  """Sizes of an array, or of a tuple's first."""
  return numbers(re.search(r"\[([\d,]*)\]", shape)[1])


def numbers(text: str) -> list[int]:
  """Reads all whole numbers of a text."""
  return [int(number) for number in re.findall(r"\d+", text)]
