"""The process that holds the TPU's compiler: reads a task from a folder, leaves an answer there.

`python -m llmjax.plan.compiler FOLDER`, as `plan/ahead.py` calls it.
"""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import jax

from llmjax.core.config import freeze
from llmjax.core.errors import UserError
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.train.config import Config
from llmjax.train.shrink import made_up_batch
from llmjax.train.state import abstract_state
from llmjax.train.step import compile_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FULL = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_BUFFER = re.compile(
  r"Size: ([\d.]+)([KMGT]?).*?\n(?:\s+Operator: (.*?)\n)?.*?Shape: (\S+)", re.DOTALL
)


def main(folder: Path):
  """Compiles the task of a folder and writes `answer.json` and `program.txt` beside it."""
  task = json.loads((folder / "task.json").read_text())
  try:
    answer, text = _compile(task)
  except UserError as error:
    answer, text = {"error": str(error)}, ""
  if text:
    (folder / "program.txt").write_text(text)
  (folder / "answer.json").write_text(json.dumps(answer))


def _compile(task) -> tuple[dict, str]:
  from jax.experimental import topologies

  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "the TPU's compiler is not installed: pip install 'llmjax[plan]' brings it (libtpu)"
    )
  config = freeze(task["config"], Config)
  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=task["topology"], num_slices=task["slices"]
    )
  except jax.errors.JaxRuntimeError as error:
    line = str(error).splitlines()[0]
    raise UserError(f"the TPU's compiler knows no topology {task['topology']}: {line}") from error
  mesh = make_mesh(config.mesh, described.devices)
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)),
    made_up_batch(config),
  )
  with jax.set_mesh(mesh):
    lowered = compile_step(config, mesh).lower(abstract_state(config, mesh), batch)
    began_s = time.perf_counter()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      return _full(str(error), time.perf_counter() - began_s), ""
  seconds = time.perf_counter() - began_s
  return {"memory": _memory(compiled), "compile_s": seconds}, compiled.as_text()


def _memory(compiled) -> dict:
  said = compiled.memory_analysis()
  return {
    "arguments": said.argument_size_in_bytes,
    "outputs": said.output_size_in_bytes,
    "aliased": said.alias_size_in_bytes,
    "temporaries": said.temp_size_in_bytes,
    "peak": said.peak_memory_in_bytes,
  }


def _full(message: str, compile_s: float) -> dict:
  """Reads the compiler's report of a program that does not fit."""
  found = _FULL.search(message)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    raise UserError(f"the TPU's compiler refused the program: {message.splitlines()[0]}")
  largest = [
    (_bytes(size, unit), shape, operator or "", "")
    for size, unit, operator, shape in _BUFFER.findall(message)
  ]
  return {
    "memory": {}, "compile_s": compile_s, "wanted_bytes": _bytes(found[1], found[2]),
    "largest": largest,
  }


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * _UNITS[unit])


if __name__ == "__main__":
  main(Path(sys.argv[1]))
