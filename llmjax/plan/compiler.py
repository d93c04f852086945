"""The process that holds the TPU's compiler: reads a task from a folder, leaves an answer there.

`python -m llmjax.plan.compiler FOLDER`, as `plan/ahead.py` calls it.
"""

import gzip
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
from llmjax.plan.buffers import largest_buffers
from llmjax.plan.decode import lower_serving
from llmjax.train import executable
from llmjax.train.config import Config
from llmjax.train.shrink import made_up_batch
from llmjax.train.state import abstract_state
from llmjax.train.step import compile_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FULL = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


def main(folder: Path):
  """Compiles the task of a folder and writes `answer.json` and `program.txt.gz` beside it."""
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
  lowered = _lower(task["program"], config, mesh)
  began_s = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    return read_full(str(error)) | {"compile_s": time.perf_counter() - began_s}, ""
  seconds = time.perf_counter() - began_s
  if task["keep_executable"]:
    executable.save(task["keep_executable"], compiled, config, mesh)
  text = compiled.as_text()
  return {
    "memory": _memory(compiled), "compile_s": seconds, "largest": largest_buffers(text)
  }, text


def _devices(name: str, slices: int):
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=name, num_slices=slices
    )
  except jax.errors.JaxRuntimeError as error:
    line = str(error).splitlines()[0]
    raise UserError(f"the TPU's compiler knows no topology {name}: {line}") from error
  return described.devices


def _lower(program: str, config: Config, mesh):
  if program != "train":
    return lower_serving(program, config, mesh)
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)),
    made_up_batch(config),
  )
  with jax.set_mesh(mesh):
    return compile_step(config, mesh).lower(abstract_state(config, mesh), batch)


def _memory(compiled) -> dict:
  said = compiled.memory_analysis()
  return {
    "arguments": said.argument_size_in_bytes,
    "outputs": said.output_size_in_bytes,
    "aliased": said.alias_size_in_bytes,
    "temporaries": said.temp_size_in_bytes,
    "code": said.generated_code_size_in_bytes,
    "peak": said.peak_memory_in_bytes,
  }


if __name__ == "__main__":
  main(Path(sys.argv[1]))
