"""Compile-ahead: the actual program, through the TPU's compiler, with no TPU at hand.

The compiler runs in a process of its own with a clean environment, since it wants flags and devices
that the caller's jax does not. What it answers is kept on disk by everything that decides it. It is
an estimate of the compiler's, never a measurement.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from llmjax.core.chips import Topology
from llmjax.core.config import to_dict
from llmjax.core.errors import UserError
from llmjax.parallel.hlo_arrays import Buffer
from llmjax.training.config import Config
from llmjax.training.executable import source_hash

_CLEAN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_", "JAX_", "MEGASCALE")
_SET = {
  "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu",
  "TPU_ACCELERATOR_TYPE": "",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second compiler at the same time is refused
  "MALLOC_ARENA_TEST": "8",  # as it is; told, so that `tune_allocator` leaves each thread its heap
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compilation left.

  Attributes:
    text: optimized HLO; "" if the program does not fit.
    memory: bytes of a device by kind: arguments, outputs, aliased, temporaries, code, peak.
    compile_s: seconds the compiler took.
    wanted_bytes: what a program that does not fit wanted of a device, else 0.
    limit_bytes: what there was for it, else 0.
    largest: the largest arrays, `Buffer`s; of a program that does not fit those alive when most is.
    cached: whether it was compiled before, and not now.
  """

  text: str
  memory: dict
  compile_s: float
  wanted_bytes: int = 0
  limit_bytes: int = 0
  largest: tuple = ()
  cached: bool = False


def compile_ahead(
  config: Config, topology: Topology, program: str = "train", keep_executable: str = ""
) -> Compiled:
  """Compiles one of an experiment's programs for a topology, or finds what was said of it before.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    topology: chips; TPUs.
    program: train, prefill or decode.
    keep_executable: file for the program itself, for a run to load; it is then always compiled.
  Raises:
    UserError: the TPU's compiler is not installed, or refuses the topology or the program.
  """
  task = {
    "config": to_dict(config), "topology": topology.name, "slices": topology.slices,
    "program": program,
  }
  folder = cache_folder() / _key(task)
  cached = folder.is_dir() and not keep_executable
  if not cached:
    kept = keep_executable and os.path.abspath(keep_executable)
    _compile(task | {"keep_executable": kept}, folder)
  said = json.loads((folder / "answer.json").read_text())
  said["largest"] = tuple(Buffer(*row) for row in said["largest"])
  text = gzip.decompress((folder / "program.txt.gz").read_bytes()).decode()
  return Compiled(text, cached=cached, **said)


def cache_folder() -> Path:
  """Where answers are kept: `$LLMJAX_CACHE/plan`, by default `~/.cache/llmjax/plan`."""
  return Path(os.environ.get("LLMJAX_CACHE") or Path.home() / ".cache" / "llmjax") / "plan"


def has_compiler() -> bool:
  """Whether the TPU's compiler is installed."""
  return importlib.util.find_spec("libtpu") is not None


def _key(task: dict) -> str:
  """Hashes all that decides an answer: the task, versions, llmjax's own source."""
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
  decides = json.dumps([task, versions, source_hash()], sort_keys=True)
  return hashlib.sha256(decides.encode()).hexdigest()[:24]


def _compile(task: dict, folder: Path):
  """Has the compiler's process fill a folder, which is whole once it has its name."""
  partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
  partial.mkdir(parents=True)
  try:
    (partial / "task.json").write_text(json.dumps(task))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_CLEAN)}
    command = [sys.executable, "-m", "llmjax.planning.compiler", str(partial)]
    print(f"compiling {task['program']} for {task['topology']}", file=sys.stderr)
    done = subprocess.run(command, env=kept | _SET, capture_output=True, text=True, check=False)
    if not (partial / "answer.json").exists():
      raise UserError(f"the TPU's compiler failed: {_last_line(done.stderr)}")
    if refused := json.loads((partial / "answer.json").read_text()).get("error"):
      raise UserError(refused)
    partial.rename(folder)
  except OSError:
    if not folder.is_dir():  # else: another process finished the same task first
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or ["it said nothing"])[-1]
