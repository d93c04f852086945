"""Compile-ahead: the actual program, through the TPU's compiler, with no TPU at hand.

The compiler runs in a process of its own with a clean environment, since it wants flags and devices
that the caller's jax does not. Its answers are cached on disk, by everything that decides them.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax

from llmjax.core.chips import Topology
from llmjax.core.config import freeze
from llmjax.core.errors import UserError
from llmjax.parallel.hlo_arrays import MOST, Buffer, largest_buffers
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.planning.decode import serving_program
from llmjax.training import executable
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compile_step

_START = "import sys; from llmjax.planning.compiler import main; main(sys.argv[1])"
_CLEAN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_", "JAX_", "MEGASCALE")
_SET = {
  "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu",
  "TPU_ACCELERATOR_TYPE": "",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second compiler at the same time is refused
  "MALLOC_ARENA_TEST": "8",  # the default, set so that `tune_allocator` leaves each thread its heap
}
_SIZE = r"\(?([\d.]+)([KMGT]?)\)?"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What is wanted, of what there is. By "temporaries" arguments are meant too: it grows by as much a
# row as the peak of programs that fit.
_FULL = re.compile(rf"(?:temporaries|Used) {_SIZE} (?:exceeds available HBM|of) {_SIZE}")


def compile_ahead(
  config: Config, topology: Topology, program: str = "train", keep_executable: str = ""
) -> tuple[dict, str]:
  """Compiles one of an experiment's programs for a topology, or finds an earlier answer.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    topology: chips; TPUs.
    program: train, prefill or decode.
    keep_executable: file for the program itself, for a run to load; it is then always compiled.
  Returns:
    (`compile_s`, whether it is `cached`, the `largest_buffers`, and by kind the `memory` of a
    device; the optimized HLO). Of a program that does not fit `peak_bytes` and `usable_bytes` in
    place of `memory`, and no HLO.
  Raises:
    UserError: the TPU's compiler is not installed, or refuses the topology or the program.
  """
  task = {
    "config": dataclasses.asdict(config), "topology": topology.name, "slices": topology.slices,
    "program": program,
  }
  folder = cache_folder() / _key(task)
  cached = folder.is_dir() and not keep_executable
  if not cached:
    kept = keep_executable and os.path.abspath(keep_executable)
    _run_compiler(task | {"keep_executable": kept}, folder)
  answer = json.loads((folder / "answer.json").read_text())
  text = gzip.decompress((folder / "program.txt.gz").read_bytes()).decode()
  return answer | {"cached": cached}, text


def cache_folder() -> Path:
  """Where answers are kept: `$LLMJAX_CACHE/plan`, by default `~/.cache/llmjax/plan`."""
  return Path(os.environ.get("LLMJAX_CACHE") or Path.home() / ".cache" / "llmjax") / "plan"


def has_compiler() -> bool:
  """Whether the TPU's compiler is installed."""
  return importlib.util.find_spec("libtpu") is not None


def _key(task: dict) -> str:
  """Hashes all that decides an answer: the task, versions, llmjax's own source."""
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
  decides = json.dumps([task, versions, executable.source_hash()], sort_keys=True)
  return hashlib.sha256(decides.encode()).hexdigest()[:24]


def _run_compiler(task: dict, folder: Path):
  """Has the compiler's process fill a folder, which is whole once it has its name."""
  partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
  partial.mkdir(parents=True)
  try:
    (partial / "task.json").write_text(json.dumps(task))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_CLEAN)}
    command = [sys.executable, "-c", _START, str(partial)]
    print(f"compiling {task['program']} for {task['topology']}", file=sys.stderr)
    done = subprocess.run(command, env=kept | _SET, capture_output=True, text=True, check=False)
    if not (partial / "answer.json").exists():
      lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
      raise UserError(f"the TPU's compiler failed: {lines[-1]}")
    if refused := json.loads((partial / "answer.json").read_text()).get("error"):
      raise UserError(refused)
    partial.rename(folder)
  except OSError:
    if not folder.is_dir():  # else: another process finished the same task first
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def main(folder: str):
  """The compiler's process: reads the task of a folder, writes its answer and program there."""
  folder = Path(folder)
  task = json.loads((folder / "task.json").read_text())
  try:
    answer, text = _compile(task)
  except UserError as error:
    answer, text = {"error": str(error)}, ""
  (folder / "program.txt.gz").write_bytes(gzip.compress(text.encode()))
  (folder / "answer.json").write_text(json.dumps(answer))


def _compile(task) -> tuple[dict, str]:
  config = freeze(task["config"], Config)
  mesh = make_mesh(config.mesh, _devices(task["topology"], task["slices"]))
  run, arguments = _program(task["program"], config, mesh)
  with jax.set_mesh(mesh):
    lowered = run.lower(*arguments)
  began_s, compiled = time.perf_counter(), None
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    answer, text, buffers = read_full(str(error)), "", _argument_buffers(arguments)
  compile_s = time.perf_counter() - began_s
  if compiled:
    if task["keep_executable"]:
      executable.save(task["keep_executable"], compiled, config, mesh)
    answer, text = {"memory": _memory(compiled)}, compiled.as_text()
    buffers = largest_buffers(text)
  buffers = [buffer._asdict() for buffer in buffers]
  return answer | {"compile_s": compile_s, "largest_buffers": buffers}, text


def _devices(name: str, slices: int):
  from jax.experimental import topologies

  alone = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=name, num_slices=slices, **alone
    )
  except jax.errors.JaxRuntimeError as error:
    line = str(error).splitlines()[0]
    raise UserError(f"the TPU's compiler knows no topology {name}: {line}") from error
  return described.devices


def _program(program: str, config: Config, mesh):
  """A jitted function and its abstract arguments."""
  if program != "train":
    return serving_program(program, config, mesh)
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)),
    made_up_batch(config),
  )
  return compile_step(config, mesh), (abstract_state(config, mesh), batch)


def _argument_buffers(arguments) -> list[Buffer]:
  """The largest of a device's parts of all arguments; the compiler lists no arrays itself."""
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
    shape = leaf.sharding.shard_shape(leaf.shape)
    name = f"{leaf.dtype.name.replace('float', 'f')}[{','.join(map(str, shape))}]"
    path = jax.tree_util.keystr(path[1:], simple=True, separator=".")
    found.append(Buffer(math.prod(shape) * leaf.dtype.itemsize, name, path, ""))
  return sorted(found, key=lambda buffer: -buffer.bytes)[:MOST]


def _memory(compiled) -> dict:
  names = {
    "arguments": "argument_size", "outputs": "output_size", "aliased": "alias_size",
    "temporaries": "temp_size", "code": "generated_code_size", "peak": "peak_memory",
  }
  found = compiled.memory_analysis()
  return {kind: getattr(found, f"{name}_in_bytes") for kind, name in names.items()}


def read_full(message: str) -> dict:
  """Reads the compiler's report of a program that does not fit.

  Returns:
    `peak_bytes`, which it wants of a device, and `usable_bytes`.
  Raises:
    UserError: the report is of something else.
  """
  found = _FULL.search(message)
  if not found:
    raise UserError(f"the TPU's compiler refused the program: {message.splitlines()[0]}")
  wanted, unit, usable, usable_unit = found.groups()
  return {
    "peak_bytes": round(float(wanted) * _UNITS[unit]),
    "usable_bytes": round(float(usable) * _UNITS[usable_unit]),
  }
