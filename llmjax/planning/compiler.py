"""The process that holds the TPU's compiler: reads a task from a folder, leaves an answer there.

`python -m llmjax.planning.compiler FOLDER`, as `planning/ahead.py` calls it.
"""

import gzip
import json
import math
import re
import sys
import time
from pathlib import Path

import jax

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

_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What is wanted, of what there is. Newer compilers say "temporaries" and count arguments too: it
# grows by as much a row as the peak of programs that fit. Older ones list the largest arrays.
_FULL = re.compile(
  rf"Used {_SIZE} of {_SIZE} hbm|temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"
)
_BUFFER = re.compile(
  rf"Size: {_SIZE}\n(?:\s+Operator: (.*)\n)?\s+Shape: (\w+\[[\d,]*\])"
)
_SAID = re.compile(r'(\w+)=(?:"([^"]*)"|(\S+))')


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
  run, arguments = _program(task["program"], config, mesh)
  with jax.set_mesh(mesh):
    lowered = run.lower(*arguments)
  began_s = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    seconds = time.perf_counter() - began_s
    return read_full(str(error), _given(arguments)) | {"compile_s": seconds}, ""
  seconds = time.perf_counter() - began_s
  if task["keep_executable"]:
    executable.save(task["keep_executable"], compiled, config, mesh)
  text = compiled.as_text()
  said = {"memory": _memory(compiled), "compile_s": seconds, "largest": largest_buffers(text)}
  return said, text


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


def _given(arguments) -> list[Buffer]:
  """A device's parts of all arguments, the largest first."""
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
    shape = leaf.sharding.shard_shape(leaf.shape)
    name = f"{leaf.dtype.name.replace('float', 'f')}[{','.join(map(str, shape))}]"
    path = jax.tree_util.keystr(path[1:], simple=True, separator=".")
    found.append(Buffer(math.prod(shape) * leaf.dtype.itemsize, name, path, ""))
  return sorted(found, key=lambda one: -one.bytes)


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


def read_full(message: str, given: list[Buffer]) -> dict:
  """Reads the compiler's report of a program that does not fit.

  Args:
    message: the report.
    given: the program's arguments, which stand in where it lists no arrays.
  Returns:
    `wanted_bytes` and `limit_bytes` of a device, and the `largest` arrays.
  Raises:
    UserError: the report is of something else.
  """
  found = _FULL.search(message)
  if not found:
    raise UserError(f"the TPU's compiler refused the program: {message.splitlines()[0]}")
  number, unit, limit, limit_unit = (part for part in found.groups() if part is not None)
  largest = []
  for size, size_unit, operator, shape in _BUFFER.findall(message):
    said = {key: quoted or bare for key, quoted, bare in _SAID.findall(operator)}
    source = f"{said['source_file']}:{said['source_line']}" if "source_file" in said else ""
    largest.append(Buffer(_bytes(size, size_unit), shape, said.get("op_name", ""), source))
  return {
    "memory": {}, "wanted_bytes": _bytes(number, unit), "limit_bytes": _bytes(limit, limit_unit),
    "largest": largest or given[:MOST],
  }


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * _UNITS[unit])


if __name__ == "__main__":
  main(Path(sys.argv[1]))
