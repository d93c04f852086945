"""Formulas against this CPU: bytes planned, set aside and used; seconds planned and spent."""

import re
import timeit
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.config import override
from llmjax.core.memory import give_back, settle
from llmjax.data import loader
from llmjax.parallel.mesh import axis_sizes, make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.planning.cost import memory, step_flops
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state, init_sharded
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compile_step

CASES = (
  "layers=4 width=512 heads=8 mlp_width=1536 vocab_size=8192 max_seq_len=256",
  "layers=6 width=512 heads=8 mlp_width=1536 vocab_size=8192 max_seq_len=256 remat=full",
  "layers=4 width=768 heads=12 mlp_width=2048 vocab_size=16384 max_seq_len=256 remat=dots",
)
_SIDE = 2048  # of the matrices that say what this machine can do


def cpu_rows(repeat: int) -> list[dict]:
  """Plans, compiles and runs each case on one device.

  Args:
    repeat: steps, and products, of which the fastest counts.
  Returns:
    A row a case: the formula's bytes, the compiler's, what the process grew by; the formula's
    FLOPs at the rate of a large product in seconds, and the step's.
  """
  rate = matmul_rate(repeat)
  return [_row(changes, rate, repeat) for changes in CASES]


def matmul_rate(repeat: int) -> float:
  """Measures FLOP/s of a product of two large fp32 matrices."""
  a = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE))
  run = jax.jit(jnp.dot).lower(a, a).compile()
  spent_s = min(timeit.repeat(lambda: jax.block_until_ready(run(a, a)), number=1, repeat=repeat))
  return 2 * _SIDE**3 / spent_s


def _row(changes: str, rate: float, repeat: int) -> dict:
  config = override(Config(), [
    *(f"--config.model.{change}" for change in changes.split()), "--config.model.dtype=float32",
    "--config.data.batch_size=8", "--config.mesh.data=1",
  ])
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  batch = loader.place(made_up_batch(config), batch_sharding(mesh))
  with jax.set_mesh(mesh):
    described = abstract_state(config, mesh)
    compiled = compile_step(config, mesh).lower(described, batch).compile()
  state = init_sharded(config, mesh)
  give_back()
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  before = _status("VmRSS") - held
  Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the most of what follows
  spent_s = []
  for number in range(repeat + 1):
    began_s = timeit.default_timer()
    state, metrics = compiled(state, batch)
    settle((state, metrics))
    spent_s.append(timeit.default_timer() - began_s)
    if number == 0:  # a later step on a busy machine may begin before this one's memory is free
      grown = _status("VmHWM") - before
  said, sizes = compiled.memory_analysis(), axis_sizes(config.mesh, 1)
  return {
    "config": changes,
    "formula_bytes": memory(config, sizes).peak,
    "program_bytes": said.argument_size_in_bytes + said.temp_size_in_bytes,
    "grown_bytes": grown,
    "formula_s": sum(step_flops(config, sizes, "cpu")) / rate,
    "seconds_per_step": min(spent_s[1:]),
  }


def _status(name: str) -> int:
  """Bytes of this process by Linux's name for them."""
  return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
