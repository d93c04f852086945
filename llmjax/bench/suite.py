"""The benchmarks by name: which workers run, what a round asks of them, what is printed."""

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmjax.bench import attention, plan_table
from llmjax.bench.report import compare, cores, machine, ratio, table
from llmjax.bench.sizes import NEW_TOKENS, PROMPT_TOKENS, SIZES, write_weights
from llmjax.bench.workers import PEERS, Spec, Worker, interleave, pick, say
from llmjax.core.config import override
from llmjax.core.errors import UserError, nearest
from llmjax.models.config import DTYPES
from llmjax.training.config import Config

ALONE = {"attention": attention.measure, "plan": plan_table.measure}  # without peers
BENCHES = (*PEERS, *ALONE)
_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # bf16 keeps 8 bits of a logit
_COLUMNS = {
  "peer": "peer",
  "positions": "positions",
  "topology": "topology",
  "config": "changes",
  "formula_tflops": "TFLOPs",
  "program_tflops": "program's",
  "flops_ratio": "ratio",
  "formula_bytes": "planned MB",
  "program_bytes": "compiler's MB",
  "bytes_ratio": "ratio",
  "grown_bytes": "grown MB",
  "formula_s": "planned s",
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
  "compile_s": "compile s",
}


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
    name: train, moe, decode, data, attention or plan.
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
  if name not in ALONE:
    return head | _go_round(name, options)
  if options.peers:
    raise UserError(f"bench {name} has no peers")
  return head | ALONE[name](options)


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


def _value(row: dict, column: str):
  value = row.get(column)
  return value / 1e6 if value is not None and column.endswith("_bytes") else value


def _go_round(bench: str, options: Options) -> dict:
  """Asks a benchmark's workers in turn; what is asked of them is a case each."""
  cases = [{"batch": 1}, {"batch": 8}] if bench == "decode" else [{}]
  requests = [{"seconds": options.seconds, **case} for case in cases]
  with contextlib.ExitStack() as stack:
    workers, told = _start(stack, bench, options)
    made = interleave(workers, dict.fromkeys(workers, requests), options.rounds)
  base = next(iter(PEERS[bench]))
  for place, case in enumerate(cases):
    rounds = {name: answers[place] for name, answers in made.items()}
    rows = [{**workers[row["peer"]].facts, **row} for row in compare(rounds, base)]
    if bench == "data" and base in rounds:
      for row in rows:
        row["ratio"] = ratio(rounds[row["peer"]], rounds[base])
    told["notes"] += _check_losses(rows, _LOSS_TOLERANCE[options.dtype])
    told["notes"] += _check_tokens(rows, rounds, **case)
    case |= {"title": _title(bench, options, **case), "rows": rows}
  return {"cases": cases, **told}


def _start(stack: contextlib.ExitStack, bench: str, options: Options):
  """Starts the chosen peers over one folder of weights; llmjax twice, to time its first step.

  Returns:
    The workers by name, and what is told of llmjax's first step, with `notes`.
  """
  chosen = pick(bench, options.peers)
  if not chosen:
    raise UserError(f"bench {bench}: none of the peers asked for is installed")
  scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-bench-")))
  for size in {options.size + peer.kind for peer in chosen.values()}:
    (scratch / size).mkdir()
    write_weights(SIZES[size], scratch / size)
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def start(name: str, again: str = "") -> Worker:
    say(f"preparing {name}{again}")
    where, size = chosen[name].where, options.size + chosen[name].kind
    spec = Spec(where, size, options.dtype, str(scratch / size), cores(), options.overrides)
    return Worker(name + again, spec, cache if name == "llmjax" else {})

  workers, told = {}, {"notes": []}
  for name in chosen:
    workers[name] = stack.enter_context(contextlib.closing(start(name)))
    if name == "llmjax":
      with contextlib.closing(start(name, " once more, from its compilation cache")) as warm:
        warm_s = warm.facts["first_step_s"]
      cold_s = workers[name].facts["first_step_s"]
      told |= {"first_step_cold_s": cold_s, "first_step_warm_s": warm_s}
      told["notes"].append(
        f"llmjax's first step: {cold_s:.1f} s with an empty compilation cache, {warm_s:.1f} s with "
        "a filled one"
      )
  return workers, told


def _check_losses(rows: Sequence[dict], tolerance: float) -> list[str]:
  """Warns where training begins with different losses; `dense` is another model than the rest."""
  losses = {row["peer"]: row["first_loss"] for row in rows if "first_loss" in row}
  losses.pop("dense", None)
  if not losses or max(losses.values()) - min(losses.values()) <= tolerance:
    return []
  return [f"WARNING: first losses differ, peers do not do the same: {losses}"]


def _check_tokens(
  rows: Sequence[dict], rounds: Mapping[str, list[dict]], batch: int = 0
) -> list[str]:
  """Counts the leading tokens that a peer wrote as the first peer did; warns where they are few."""
  first = next(iter(rounds.values()))[0].get("ids")
  if first is None:
    return []
  for row in rows:
    pairs = zip(first, rounds[row["peer"]][0]["ids"], strict=True)
    row["same_tokens"] = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
  if min(row["same_tokens"] for row in rows) >= 8:
    return []
  return [f"WARNING: greedy tokens differ early (batch {batch}), see same_tokens"]


def _title(bench: str, options: Options, batch: int = 0) -> str:
  size = SIZES[options.size + ("-moe" if bench == "moe" else "")]
  scale = f"{size.parameters / 1e6:.1f} M parameters, batch {size.batch_size} × {size.length}"
  ours = "ratio: llmjax ÷ peer, median over rounds"
  return {
    "train": f"training, {scale}; {ours}; peak: of the steps",
    "moe": f"training, {size.experts} experts, 2 a token, {scale}; dense: llmjax at equal active "
    f"FLOPs; {ours}",
    "decode": f"decoding, batch {batch}, prompt {PROMPT_TOKENS}, {NEW_TOKENS} new, greedy; "
    f"tokens/s of a whole call; {ours}",
    "data": "tokenizing, and packing and batching, against what the training step consumes; "
    "ratio: peer ÷ step, median over rounds",
  }[bench]
