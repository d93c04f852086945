"""The benchmarks by name: which workers run, what a round asks of them, what is printed."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmjax.bench import attention
from llmjax.bench.harness import Worker, interleave
from llmjax.bench.peers import Spec, pick
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
    for key, known in (("size", SIZES), ("dtype", DTYPES)):
      if getattr(self, key) not in known:
        raise UserError(
          f"bench: unknown {key} {getattr(self, key)!r}; {nearest(getattr(self, key), known)}"
        )
    if self.rounds < 1 or self.seconds <= 0:
      raise UserError(f"bench: rounds {self.rounds} and seconds {self.seconds} must be positive")
    override(Config(), self.overrides)


def bench(name: str, options: Options | None = None) -> dict:
  """Runs a benchmark.

  Args:
    name: train, decode, data or attention.
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


class _Run:
  """Workers of one benchmark, over one folder of weights; closes them all."""

  def __init__(self, options: Options):
    self.options = options
    self.workers: dict[str, Worker] = {}
    self._folders: dict[str, str] = {}
    self._stack = contextlib.ExitStack()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._stack.close()

  def start(self, name: str, where: str, size: str, environment=None) -> Worker:
    """Starts a worker and waits until it is ready."""
    _say(f"preparing {name}")
    if size not in self._folders:
      folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-bench-"))
      write_weights(SIZES[size], Path(folder))
      self._folders[size] = folder
    options = self.options
    spec = Spec(where, size, options.dtype, self._folders[size], cores(), options.overrides)
    worker = Worker(name, spec, environment)
    self._stack.callback(worker.close)
    return worker

  def scratch(self) -> str:
    """Makes an empty folder that lives as long as the run."""
    return self._stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-bench-"))

  def go(self, requests: Sequence[dict]) -> dict[str, list[list[dict]]]:
    """Goes round all workers with the same requests."""
    tell = lambda number, name: _say(f"round {number + 1} of {self.options.rounds}: {name}")  # noqa: E731
    same = dict.fromkeys(self.workers, requests)
    return interleave(self.workers, same, self.options.rounds, tell)


def _start_peers(run: _Run, bench: str) -> dict:
  """Starts the chosen peers of a benchmark; returns llmjax's times to a first step."""
  times = {}
  for name, peer in pick(bench, run.options.peers).items():
    if name != "llmjax":
      run.workers[name] = run.start(name, peer.where, run.options.size)
      continue
    cache = {
      "JAX_COMPILATION_CACHE_DIR": run.scratch(),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run.workers[name] = run.start(name, peer.where, run.options.size, cache)
    warm = run.start(
      f"{name} once more, from its compilation cache", peer.where, run.options.size, cache
    )
    times = {
      "first_step_cold_s": run.workers[name].facts["first_step_s"],
      "first_step_warm_s": warm.facts["first_step_s"],
    }
    warm.close()
  if not run.workers:
    raise UserError(f"bench {bench}: none of the peers asked for is installed")
  return times


def _with_facts(rows: list[dict], run: _Run) -> list[dict]:
  return [{**run.workers[row["peer"]].facts, **row} for row in rows]


def _train(options: Options) -> dict:
  with _Run(options) as run:
    times = _start_peers(run, "train")
    made = run.go([{"seconds": options.seconds}])
    rounds = {name: answers[0] for name, answers in made.items()}
    rows = _with_facts(compare(rounds, "llmjax"), run)
  losses = [row["first_loss"] for row in rows]
  notes = _first_step_notes(times)
  if max(losses) - min(losses) > _LOSS_TOLERANCE[options.dtype]:
    notes.append(f"WARNING: first losses differ, peers do not do the same: {losses}")
  size = SIZES[options.size]
  title = (
    f"training, {size.parameters / 1e6:.1f} M parameters, batch {size.batch_size} × {size.length};"
    " ratio: llmjax ÷ peer, median over rounds; peak: of the steps"
  )
  return {"cases": [{"title": title, "rows": rows}], **times, "notes": notes}


def _decode(options: Options) -> dict:
  batches = (1, 8)
  with _Run(options) as run:
    times = _start_peers(run, "decode")
    made = run.go([{"batch": batch} for batch in batches])
    cases, notes = [], _first_step_notes(times)
    for place, batch in enumerate(batches):
      rounds = {name: answers[place] for name, answers in made.items()}
      rows = _with_facts(compare(rounds, "llmjax"), run)
      for row in rows:
        row["same_tokens"] = _same(rounds, row["peer"])
      if any(row["same_tokens"] < 8 for row in rows):
        notes.append(f"WARNING: greedy tokens differ early (batch {batch}), see same_tokens")
      title = (
        f"decoding, batch {batch}, prompt 128, 128 new, greedy; tokens/s of a whole call; "
        "ratio: llmjax ÷ peer, median over rounds"
      )
      cases.append({"title": title, "batch": batch, "rows": rows})
  return {"cases": cases, **times, "notes": notes}


def _same(rounds, name: str) -> int:
  """Counts the leading tokens a peer wrote that are those of the first peer."""
  first, ids = next(iter(rounds.values()))[0]["ids"], rounds[name][0]["ids"]
  differs = [i for i, (a, b) in enumerate(zip(first, ids, strict=True)) if a != b]
  return differs[0] if differs else len(ids)


def _first_step_notes(times: dict) -> list[str]:
  if not times:
    return []
  return [
    f"llmjax's first step: {times['first_step_cold_s']:.1f} s with an empty compilation cache, "
    f"{times['first_step_warm_s']:.1f} s with a filled one"
  ]


def _data(options: Options) -> dict:
  with _Run(options) as run:
    for name, peer in pick("data", options.peers).items():
      run.workers[name] = run.start(name, peer.where, options.size)
    made = run.go([{"seconds": options.seconds}])
    rounds = {name: answers[0] for name, answers in made.items()}
    rows = _with_facts(compare(rounds, "step"), run)
  for row in rows:
    if "ratio" in row:
      row["ratio"] = ratio(rounds[row["peer"]], rounds["step"])
  title = (
    "tokenizing, and packing and batching, against what the training step consumes; "
    "ratio: peer ÷ step, median over rounds"
  )
  return {"cases": [{"title": title, "rows": rows}]}


BENCHES = {"train": _train, "decode": _decode, "data": _data, "attention": attention.measure}


def _say(text: str):
  print(text, file=sys.stderr, flush=True)
