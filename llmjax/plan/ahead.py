"""Compile-ahead: the actual train step, through the TPU's compiler, with no TPU at hand.

The compiler runs in a process of its own with a clean environment (`plan` starts it), since its
library must not meet a jax that computes on the CPU. What it says is an estimate of the compiler's,
never a measurement.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llmjax.core.config import to_dict
from llmjax.core.errors import UserError
from llmjax.plan.chips import Topology
from llmjax.train.config import Config

_CLEAN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_", "JAX_", "MEGASCALE")
_SET = {
  "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu",
  "TPU_ACCELERATOR_TYPE": "",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compilation left.

  Attributes:
    text: optimized HLO; "" if the program does not fit.
    memory: bytes of a device by kind: arguments, outputs, aliased, temporaries, peak.
    compile_s: seconds the compiler took.
    wanted_bytes: what a program that does not fit wanted of a device, else 0.
    largest: what takes most of a device's memory: (bytes, shape, operation, source line).
  """

  text: str
  memory: dict
  compile_s: float
  wanted_bytes: int = 0
  largest: tuple = ()


def compile_ahead(config: Config, topology: Topology) -> Compiled:
  """Compiles an experiment's train step for a topology.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    topology: chips; TPUs.
  Raises:
    UserError: the TPU's compiler is not installed, or refuses the topology or the program.
  """
  with tempfile.TemporaryDirectory(prefix="llmjax-plan-") as folder:
    task = {"config": to_dict(config), "topology": topology.name, "slices": topology.slices}
    (Path(folder) / "task.json").write_text(json.dumps(task))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_CLEAN)}
    command = [sys.executable, "-m", "llmjax.plan.compiler", folder]
    done = subprocess.run(command, env=kept | _SET, capture_output=True, text=True, check=False)
    answer = Path(folder) / "answer.json"
    if not answer.exists():
      raise UserError(f"the TPU's compiler failed: {_last_line(done.stderr)}")
    said = json.loads(answer.read_text())
    if "error" in said:
      raise UserError(said["error"])
    text = Path(folder) / "program.txt"
    said["largest"] = tuple(map(tuple, said.get("largest", ())))
    return Compiled(text.read_text() if text.exists() else "", **said)


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or ["it said nothing"])[-1]
