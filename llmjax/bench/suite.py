"""The benchmarks by name: which workers run, what a round asks of them, what is printed."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmjax.bench import attention
from llmjax.bench.harness import Worker, interleave
from llmjax.bench.peers import PEERS, Spec, pick
from llmjax.bench.report import compare, cores, machine, ratio, table
from llmjax.bench.sizes import SIZES, write_weights
from llmjax.core.config import override
from llmjax.core.errors import UserError, nearest
from llmjax.models.config import DTYPES
from llmjax.train.config import Config

_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # bf16 keeps 8 bits of a logit


@dataclasses.dataclass(frozen=True)
class Options:
  """How a benchmark runs.

  Attributes:
    size: architecture and batch, a name of `sizes.SIZES`.
    dtype: compute dtype.
    peers: names of peers; all there are by default.
    rounds: times round all workers.
    seconds: least length of one worker's turn, where a turn has no length of its own.
    overrides: `--config.a.b=v` arguments for llmjax.
  """

  size: str = "L"
  dtype: str = "float32"
  peers: tuple[str, ...] = ()
  rounds: int = 5
  seconds: float = 5.0
  overrides: tuple[str, ...] = ()

  def __post_init__(self):
    sizes = [name for name in SIZES if not name.endswith("-moe")]
    for key, value, known in (("size", self.size, sizes), ("dtype", self.dtype, DTYPES)):
      if value not in known:
        raise UserError(f"bench: unknown {key} {value!r}; {nearest(value, known)}")
    if self.rounds < 1 or self.seconds <= 0:
      raise UserError(f"bench: rounds {self.rounds} and seconds {self.seconds} must be positive")
    override(Config(), self.overrides)


def bench(name: str, options: Options | None = None) -> dict:
  """Runs a benchmark.

  Args:
    name: train, moe, decode, data or attention.
    options: how.
  Returns:
    `bench`, the options, `machine`, and `cases`: each a title and its rows.
  Raises:
    UserError: unknown names, or none of the peers is installed.
  """
  options = options or Options()
  if name not in BENCHES:
    raise UserError(f"unknown bench {name!r}; {nearest(name, BENCHES)}")
  head = {"bench": name, **dataclasses.asdict(options), "machine": machine()}
  if name == "attention" and options.peers:
    raise UserError("bench attention has no peers")
  return {**head, **BENCHES[name](options)}


def show(result: dict) -> str:
  """Lays a result out as tables."""
  where = result["machine"]
  lines = [
    f"{result['bench']} {result['size']} {result['dtype']} on {where['cpu']}, {where['cores']} "
    f"cores, load before {where['load_before']:.1f}"
  ]
  for case in result["cases"]:
    columns = [column for column in _COLUMNS if any(column in row for row in case["rows"])]
    rows = [[_value(row, column) for column in columns] for row in case["rows"]]
    lines += ["", case["title"], table([_COLUMNS[column] for column in columns], rows)]
  return "\n".join([*lines, *result.get("notes", ())])


_COLUMNS = {
  "peer": "peer",
  "positions": "positions",
  "tokens_per_s": "tokens/s",
  "least_per_s": "least",
  "most_per_s": "most",
  "ratio": "ratio",
  "decode_tokens_per_s": "after first token",
  "decode_ratio": "ratio",
  "seconds_per_step": "s",
  "temp_bytes": "temporary MB",
  "peak_bytes": "peak MB",
  "import_s": "import s",
  "first_step_s": "first step s",
}


def _value(row: dict, column: str):
  value = row.get(column)
  return value / 1e6 if value is not None and column.endswith("_bytes") else value


def _measure(bench: str, options: Options, requests: Sequence[dict]):
  """Goes round a benchmark's workers.

  Returns:
    For each request (answers by peer, rows), and what is told of llmjax's first step.
  """
  tell = lambda number, name: _say(f"round {number + 1} of {options.rounds}: {name}")  # noqa: E731
  with contextlib.ExitStack() as stack:
    workers, told = _start(stack, bench, options)
    made = interleave(workers, dict.fromkeys(workers, requests), options.rounds, tell)
  results = []
  for place in range(len(requests)):
    rounds = {name: answers[place] for name, answers in made.items()}
    rows = compare(rounds, next(iter(PEERS[bench])))
    results.append((rounds, [{**workers[row["peer"]].facts, **row} for row in rows]))
  return results, told


def _start(stack: contextlib.ExitStack, bench: str, options: Options):
  """Starts the chosen peers over one folder of weights; llmjax twice, to time its first step."""
  chosen = pick(bench, options.peers)
  if not chosen:
    raise UserError(f"bench {bench}: none of the peers asked for is installed")
  folders = {options.size + peer.kind: _scratch(stack) for peer in chosen.values()}
  for size, folder in folders.items():
    write_weights(SIZES[size], Path(folder))

  def start(name: str, environment: dict, again: str = "") -> Worker:
    _say(f"preparing {name}{again}")
    where, size = chosen[name].where, options.size + chosen[name].kind
    spec = Spec(where, size, options.dtype, folders[size], cores(), options.overrides)
    return stack.enter_context(contextlib.closing(Worker(name + again, spec, environment)))

  if "llmjax" not in chosen:
    return {name: start(name, {}) for name in chosen}, {"notes": []}
  cache = {"JAX_COMPILATION_CACHE_DIR": _scratch(stack)}
  cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  workers = {"llmjax": start("llmjax", cache)}
  warm = start("llmjax", cache, " once more, from its compilation cache")
  warm.close()
  workers |= {name: start(name, {}) for name in chosen if name != "llmjax"}
  return workers, _first_step(workers["llmjax"].facts["first_step_s"], warm.facts["first_step_s"])


def _scratch(stack: contextlib.ExitStack) -> str:
  return stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-bench-"))


def _first_step(cold_s: float, warm_s: float) -> dict:
  note = (
    f"llmjax's first step: {cold_s:.1f} s with an empty compilation cache, {warm_s:.1f} s with a "
    "filled one"
  )
  return {"first_step_cold_s": cold_s, "first_step_warm_s": warm_s, "notes": [note]}


def _train(options: Options) -> dict:
  ((_, rows),), told = _measure("train", options, [{"seconds": options.seconds}])
  losses = [row["first_loss"] for row in rows]
  if max(losses) - min(losses) > _LOSS_TOLERANCE[options.dtype]:
    told["notes"].append(f"WARNING: first losses differ, peers do not do the same: {losses}")
  size = SIZES[options.size]
  title = (
    f"training, {size.parameters / 1e6:.1f} M parameters, batch {size.batch_size} × {size.length};"
    " ratio: llmjax ÷ peer, median over rounds; peak: of the steps"
  )
  return {"cases": [{"title": title, "rows": rows}], **told}


def _moe(options: Options) -> dict:
  ((_, rows),), told = _measure("moe", options, [{"seconds": options.seconds}])
  losses = {row["peer"]: row["first_loss"] for row in rows if row["peer"] != "dense"}
  if max(losses.values()) - min(losses.values()) > _LOSS_TOLERANCE[options.dtype]:
    told["notes"].append(f"WARNING: first losses differ, peers do not do the same: {losses}")
  size = SIZES[f"{options.size}-moe"]
  title = (
    f"training, {size.experts} experts, 2 a token, {size.parameters / 1e6:.1f} M parameters, batch "
    f"{size.batch_size} × {size.length}; dense: llmjax at equal active FLOPs; ratio: llmjax ÷ peer"
  )
  return {"cases": [{"title": title, "rows": rows}], **told}


def _decode(options: Options) -> dict:
  batches = (1, 8)
  results, told = _measure("decode", options, [{"batch": batch} for batch in batches])
  cases = []
  for batch, (rounds, rows) in zip(batches, results, strict=True):
    for row in rows:
      row["same_tokens"] = _same(rounds, row["peer"])
    if any(row["same_tokens"] < 8 for row in rows):
      told["notes"].append(f"WARNING: greedy tokens differ early (batch {batch}), see same_tokens")
    title = (
      f"decoding, batch {batch}, prompt 128, 128 new, greedy; tokens/s of a whole call; "
      "ratio: llmjax ÷ peer, median over rounds"
    )
    cases.append({"title": title, "batch": batch, "rows": rows})
  return {"cases": cases, **told}


def _same(rounds, name: str) -> int:
  """Counts the leading tokens a peer wrote that are those of the first peer."""
  first, ids = next(iter(rounds.values()))[0]["ids"], rounds[name][0]["ids"]
  differs = [i for i, (a, b) in enumerate(zip(first, ids, strict=True)) if a != b]
  return differs[0] if differs else len(ids)


def _data(options: Options) -> dict:
  ((rounds, rows),), _ = _measure("data", options, [{"seconds": options.seconds}])
  for row in rows:
    if "ratio" in row:
      row["ratio"] = ratio(rounds[row["peer"]], rounds["step"])
  title = (
    "tokenizing, and packing and batching, against what the training step consumes; "
    "ratio: peer ÷ step, median over rounds"
  )
  return {"cases": [{"title": title, "rows": rows}]}


BENCHES = {
  "train": _train,
  "moe": _moe,
  "decode": _decode,
  "data": _data,
  "attention": attention.measure,
}


def _say(text: str):
  print(text, file=sys.stderr, flush=True)
