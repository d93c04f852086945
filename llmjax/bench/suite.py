"""`llmjax bench NAME`: the table of benchmarks and their peers, the rounds, tables of figures."""

import contextlib
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmjax.bench.ours import make_config, write_weights
from llmjax.bench.report import compare, cores, machine, table
from llmjax.bench.sizes import NEW_TOKENS, PROMPT_TOKENS, SIZES
from llmjax.bench.workers import Spec, Worker, interleave
from llmjax.core.config import override
from llmjax.core.errors import UserError, nearest, note
from llmjax.models.build import count_parameters
from llmjax.models.config import DTYPES
from llmjax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Peer:
  """One competitor.

  Attributes:
    where: `file:function` of this package; it takes a `Spec` and returns (facts, measure).
    needs: importable packages without which it is left out.
    kind: what is added to the size's name: "-moe" or nothing.
  """

  where: str
  needs: tuple[str, ...] = ()
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class Bench:
  """One benchmark.

  Attributes:
    title: heading of a case; `{model}` and the keys of its request are filled in.
    peers: competitors by name. Ratios are of the first.
    cases: what a round asks of every peer, each for `seconds` unless it says otherwise.
  """

  title: str
  peers: Mapping[str, Peer]
  cases: tuple[dict, ...] = ({},)


_TORCH = ("torch", "transformers")
BENCHES = {
  "train": Bench("training, {model}; peak: of the steps", {
    "llmjax": Peer("ours:train"),
    "transformers": Peer("torch_peers:train", _TORCH),
    "transformers-compile": Peer("torch_peers:train_compiled", _TORCH),
    "litgpt": Peer("torch_peers:train_litgpt", (*_TORCH, "litgpt", "lightning")),
  }),
  "moe": Bench("training, 8 experts, 2 per token, {model}; dense: llmjax at equal active FLOPs", {
    "llmjax": Peer("ours:train", kind="-moe"),
    "dense": Peer("ours:train"),
    "transformers": Peer("torch_peers:train", _TORCH, "-moe"),
  }),
  "decode": Bench(
    f"decoding, batch {{batch}}, prompt {PROMPT_TOKENS}, {NEW_TOKENS} new, greedy, {{model}}", {
      "llmjax": Peer("ours:decode"),
      "transformers": Peer("torch_peers:decode", _TORCH),
      "transformers-static": Peer("torch_peers:decode_static", _TORCH),
      "llama.cpp": Peer("ggml:decode", ("llama_cpp", "gguf")),
    }, ({"batch": 1}, {"batch": 8}),
  ),
  "data": Bench("tokenizing and loading against the step that reads the tokens, {model}", {
    "step": Peer("ours:train"),
    "tokenize": Peer("ours:tokenize"),
    "load": Peer("ours:load"),
  }),
  "attention": Bench(
    "attention, {positions} positions, 2 heads of 64, forward and backward", {
      "direct": Peer("ours:attention_direct"),
      "blockwise": Peer("ours:attention_blockwise"),
    }, tuple({"positions": 2**n, "seconds": 0.1} for n in range(9, 15)),
  ),
}
_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # bf16 keeps 8 bits of a logit
_COLUMNS = {
  "peer": "peer",
  "tokens_per_s": "tokens/s",
  "least_per_s": "least",
  "most_per_s": "most",
  "ratio": "ratio",
  "decode_tokens_per_s": "after first token",
  "decode_ratio": "ratio",
  "temp_bytes": "temporary bytes",
  "peak_bytes": "peak bytes",
  "first_step_s": "first step s",
}


def bench(
  name: str,
  size: str = "L",
  dtype: str = "float32",
  peers: Sequence[str] = (),
  rounds: int = 5,
  seconds: float = 5.0,
  overrides: Sequence[str] = (),
) -> dict:
  """Runs a benchmark.

  Args:
    name: one of `BENCHES`.
    size: architecture and batch, a name of `sizes.SIZES`.
    dtype: compute dtype.
    peers: names of peers; all there are by default.
    rounds: times round all workers.
    seconds: least length of one worker's turn, where a turn has no length of its own.
    overrides: `--config.a.b=v` arguments for llmjax.
  Returns:
    `bench`, the arguments, `machine`, `notes`, and `cases`: each its request, a title and its rows.
    Where llmjax is a peer also `first_step_cold_s` and `first_step_warm_s`.
  Raises:
    UserError: an argument is wrong, or none of the peers is installed.
  """
  sizes = [key for key in SIZES if not key.endswith("-moe")]
  named = (("bench", name, BENCHES), ("size", size, sizes), ("dtype", dtype, DTYPES))
  for what, value, known in named:
    if value not in known:
      raise UserError(f"bench: unknown {what} {value!r}; {nearest(value, known)}")
  if rounds < 1 or seconds <= 0:
    raise UserError(f"bench: rounds {rounds} and seconds {seconds} must be positive")
  override(Config(), overrides)
  head = {
    "bench": name, "size": size, "dtype": dtype, "peers": peers, "rounds": rounds,
    "seconds": seconds, "overrides": overrides, "machine": machine(),
  }
  benchmark, chosen = BENCHES[name], pick(name, peers)
  requests = [{"seconds": seconds, **case} for case in benchmark.cases]
  with contextlib.ExitStack() as stack:
    workers, first_steps = _start(stack, chosen, size, dtype, overrides)
    answers = interleave(workers, requests, rounds)
  base = next(iter(benchmark.peers))
  shape = SIZES[size + benchmark.peers[base].kind]
  weights = count_parameters(make_config(shape, dtype).model)
  model = f"{weights / 1e6:.1f} M parameters, batch {shape.batch_size} × {shape.length}"
  cases, notes = [], []
  for place, case in enumerate(benchmark.cases):
    measured = {peer: answers[peer][place] for peer in workers}
    rows = [{**workers[row["peer"]].facts, **row} for row in compare(measured, base)]
    notes += _differences(rows, measured, _LOSS_TOLERANCE[dtype])
    title = f"{benchmark.title.format(model=model, **case)}; ratio: {base} ÷ peer"
    cases.append(case | {"title": title, "rows": rows})
  if first_steps:
    cold_s, warm_s = first_steps.values()
    notes.append(
      f"llmjax's first step: {cold_s:.1f} s with an empty compilation cache, {warm_s:.1f} s with a "
      "filled one"
    )
  return head | {"cases": cases, "notes": notes} | first_steps


def pick(name: str, wanted: Sequence[str] = ()) -> dict[str, Peer]:
  """Chooses a benchmark's peers, and says on standard error which are not installed.

  Args:
    name: one of `BENCHES`.
    wanted: names of peers; all by default.
  Raises:
    UserError: a name is unknown, or none of those wanted is installed.
  """
  known, chosen = BENCHES[name].peers, {}
  for peer in wanted:
    if peer not in known:
      raise UserError(f"unknown peer {peer!r} of bench {name}; {nearest(peer, known)}")
  for peer in [peer for peer in known if not wanted or peer in wanted]:
    missing = [package for package in known[peer].needs if not importlib.util.find_spec(package)]
    if missing:
      how = "see requirements-bench.txt: pip install --no-deps -r requirements-bench.txt"
      note(f"{peer} is left out, {missing[0]} is not installed; {how}")
    else:
      chosen[peer] = known[peer]
  if not chosen:
    raise UserError(f"bench {name}: none of the peers asked for is installed")
  return chosen


def _start(stack: contextlib.ExitStack, peers: Mapping, size: str, dtype: str, overrides):
  """Starts peers over one folder of weights: (workers by name, times of llmjax's first step).

  llmjax is started twice, so that its first step is timed with a filled compilation cache as well.
  """
  scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-bench-")))
  for name in {size + peer.kind for peer in peers.values()}:
    write_weights(SIZES[name], scratch / name)
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def start(peer: str, again: str = "") -> contextlib.closing:
    print(f"preparing {peer}{again}", file=sys.stderr, flush=True)
    where, own = f"llmjax.bench.{peers[peer].where}", size + peers[peer].kind
    spec = Spec(where, own, dtype, str(scratch / own), cores(), tuple(overrides))
    return contextlib.closing(Worker(peer + again, spec, cache if peer == "llmjax" else {}))

  workers = {peer: stack.enter_context(start(peer)) for peer in peers}
  if "llmjax" not in workers:
    return workers, {}
  with start("llmjax", " once more, from its compilation cache") as warm:
    warm_s = warm.facts["first_step_s"]
  cold_s = workers["llmjax"].facts["first_step_s"]
  return workers, {"first_step_cold_s": cold_s, "first_step_warm_s": warm_s}


def _differences(rows: list[dict], rounds: Mapping[str, list[dict]], tolerance: float) -> list[str]:
  """Warns where peers did not do the same: other first losses, other greedy tokens early on."""
  warnings = []
  losses = {row["peer"]: row["first_loss"] for row in rows if "first_loss" in row}
  losses.pop("dense", None)  # another model than the rest
  if losses and max(losses.values()) - min(losses.values()) > tolerance:
    warnings.append(f"WARNING: first losses differ, peers do not do the same: {losses}")
  first = next(iter(rounds.values()))[0].get("ids")
  for row in rows if first else ():
    pairs = zip(first, rounds[row["peer"]][0]["ids"], strict=True)
    row["same_tokens"] = next((n for n, (a, b) in enumerate(pairs) if a != b), len(first))
  if first and min(row["same_tokens"] for row in rows) < 8:
    warnings.append("WARNING: greedy tokens differ early, see same_tokens")
  return warnings


def show(result: dict) -> str:
  """Lays a result out as tables."""
  where = result["machine"]
  lines = [
    f"{result['bench']} {result['size']} {result['dtype']} on {where['cpu']}, {where['cores']} "
    f"cores, load before {where['load_before']:.1f}"
  ]
  for case in result["cases"]:
    columns = [column for column in _COLUMNS if any(column in row for row in case["rows"])]
    rows = [[row.get(column) for column in columns] for row in case["rows"]]
    lines += ["", case["title"], table([_COLUMNS[column] for column in columns], rows)]
  return "\n".join([*lines, *result["notes"]])
