"""Formulas against the TPU's compiler: a step's FLOPs and a device's peak memory, thirty times.

And against this CPU: planned and measured bytes and seconds. What is compiled is kept beside the
picture and not compiled again; remove the file to begin anew:

  .venv/bin/python -m tests.planning.plan_table
"""

import json
import re
import sys
import tempfile
import timeit
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.chips import topology
from llmjax.core.config import override
from llmjax.core.memory import give_back, settle
from llmjax.data import loader
from llmjax.parallel.mesh import axis_sizes, make_mesh
from llmjax.parallel.rules import batch_sharding
from llmjax.planning.cost import memory, step_flops
from llmjax.planning.plan import plan
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state, init_sharded
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compile_step
from tests.reference.hlo_flops import program_flops

ROWS, PICTURE = Path("docs/plan-sanity.jsonl"), Path("docs/plan-sanity.png")
_BASE = {
  "model.layers": 4, "model.width": 1024, "model.heads": 8, "model.kv_heads": 4,
  "model.mlp_width": 2816, "model.vocab_size": 32_000, "model.max_seq_len": 2048,
  "model.tie_embeddings": False, "model.remat": "full", "data.batch_size": 16, "mesh.data": 1,
}
_WIDE = "layers=8 width=2048 heads=16 mlp_width=5632"
_7B = "layers=6 width=4096 heads=32 kv_heads=32 mlp_width=11008"
_MOE = "moe.experts=8 moe.top_k=2 moe.width=512 width=512 heads=4 mlp_width=1536"
# Topology, and what differs from the base: keys without a section are of the model.
CASES = (
  ("v5e:2x2", "mesh.fsdp=4 remat=none"),
  ("v5e:2x2", "mesh.fsdp=4 remat=dots heads=16"),
  ("v5e:2x2", "mesh.fsdp=4 remat=save_projections layers=12 width=512 mlp_width=2048"),
  ("v5e:2x2", "mesh.fsdp=4 train.grad_accum_steps=4 data.batch_size=64"),
  ("v5e:2x4", f"mesh.fsdp=8 {_WIDE} data.batch_size=32"),
  ("v5e:2x4", f"mesh.fsdp=8 {_WIDE} remat=dots"),
  ("v5e:2x4", "mesh.fsdp=4 mesh.context=2 attention.context_parallel=all_to_all max_seq_len=8192"),
  ("v5e:2x4", "mesh.data=2 mesh.fsdp=4 remat=none tie_embeddings=True vocab_size=50304"),
  ("v5e:4x4", f"mesh.fsdp=16 {_7B} data.batch_size=32"),
  ("v5e:4x4", f"mesh.fsdp=16 {_7B} remat=dots train.grad_accum_steps=2 data.batch_size=32"),
  ("v5e:4x4", f"mesh.fsdp=4 mesh.tensor=4 {_7B} data.batch_size=32"),
  ("v6e:2x2", "mesh.fsdp=4 layers=6 vocab_size=128256 remat=dots"),
  ("v6e:2x2", "mesh.fsdp=2 mesh.tensor=2 remat=none kv_heads=8"),
  ("v6e:2x4", f"mesh.fsdp=8 {_WIDE} remat=save_projections max_seq_len=4096"),
  ("v6e:2x4", f"mesh.fsdp=4 mesh.expert=2 {_MOE} moe.shared=1"),
  ("v6e:2x4", "mesh.data=8 width=512 heads=4 mlp_width=1536 remat=none data.batch_size=64"),
  ("v5p:2x2x1", f"mesh.tensor=4 {_WIDE} data.batch_size=4"),
  ("v5p:2x2x1", f"mesh.fsdp=4 {_7B} layers=2 remat=none data.batch_size=8"),
  ("v5p:2x2x1", "mesh.data=2 mesh.fsdp=2 remat=dots activation=gelu train.grad_accum_steps=2"),
  ("v5p:2x2x1", "mesh.context=4 max_seq_len=16384 data.batch_size=2 "
   "attention.context_parallel=gather"),
  ("v5p:2x2x1", f"mesh.fsdp=4 {_MOE}"),
  ("v5p:2x2x1", "mesh.stage=4 layers=8 train.grad_accum_steps=8 data.batch_size=32"),
  ("v5p:2x2x2", f"mesh.fsdp=8 {_WIDE} train.zero_stage=1"),
  ("v5p:2x2x2", f"mesh.fsdp=8 {_WIDE} train.zero_stage=2 train.grad_accum_steps=2 "
   "data.batch_size=32"),
  ("v5p:2x2x2", f"mesh.fsdp=4 mesh.tensor=2 {_WIDE} remat=dots"),
  ("v5p:2x2x2", f"mesh.expert=8 {_MOE} moe.experts=16 remat=full"),
  ("v5p:2x2x2", f"mesh.fsdp=8 {_MOE} remat=dots moe.first_k_dense=1"),
  ("v5p:2x2x2", "mesh.stage=2 mesh.fsdp=4 layers=8 train.grad_accum_steps=4 remat=none"),
  ("v5p:2x2x2", f"mesh.fsdp=8 {_7B} layers=3 optim.kind=muon data.batch_size=8"),
  ("v5p:2x2x4", f"mesh.data=2 mesh.fsdp=8 {_7B} data.batch_size=64"),
)

CPU_CASES = (
  "layers=4 width=512 heads=8 mlp_width=1536 vocab_size=8192 max_seq_len=256",
  "layers=6 width=512 heads=8 mlp_width=1536 vocab_size=8192 max_seq_len=256 remat=full",
  "layers=4 width=768 heads=12 mlp_width=2048 vocab_size=16384 max_seq_len=256 remat=dots",
)
_SIDE = 2048  # of the matrices that say what this machine can do


def config_of(changes: str) -> Config:
  """Reads a case's changes."""
  changed = dict(change.split("=") for change in changes.split())
  known = ("data", "mesh", "train", "optim", "pipeline", "loss")
  full = {
    key if key.split(".")[0] in known else f"model.{key}": value for key, value in changed.items()
  }
  full = _BASE | full
  full["tokenizer.vocab_size"] = full["model.vocab_size"]
  return override(Config(), [f"--config.{key}={value}" for key, value in full.items()])


def compiled_row(where: str, changes: str) -> dict:
  """Compiles a case and keeps what the compiler says of it."""
  with tempfile.TemporaryDirectory() as folder:
    answer = plan(config_of(changes), where, keep_hlo=f"{folder}/hlo")
    text = Path(folder, "hlo").read_text()
  flops = program_flops(text, answer["estimate"]["kernels_s"], topology(where).chip)
  return {
    "topology": where, "config": changes, "program_tflops": flops / 1e12,
    "program_bytes": answer["peak_bytes"], "compile_s": answer["compile_s"],
  }


def planned_row(row: dict) -> dict:
  """Adds what the formulas say, and formula ÷ program."""
  config, chips = config_of(row["config"]), topology(row["topology"])
  sizes = axis_sizes(config.mesh, chips.devices)
  tflops = sum(step_flops(config, sizes)) / chips.devices / 1e12
  size_bytes = memory(config, sizes, chips.chip).peak
  return row | {
    "formula_tflops": tflops, "flops_ratio": tflops / row["program_tflops"],
    "formula_bytes": size_bytes, "bytes_ratio": size_bytes / row["program_bytes"],
  }


def main(repeat: int = 5):
  """Compiles what has not been compiled yet, draws the picture, tries this CPU, prints all rows."""
  kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
  rows = {(row["topology"], row["config"]): row for row in kept}
  for number, (where, changes) in enumerate(CASES, 1):
    if (where, changes) not in rows:
      print(f"{number} of {len(CASES)}: {where} {changes}", file=sys.stderr, flush=True)
      rows[where, changes] = row = compiled_row(where, changes)
      with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
  rows = [planned_row(rows[case]) for case in CASES]
  draw(rows, PICTURE)
  for row in rows + cpu_rows(repeat):
    print(json.dumps(row))


def draw(rows: list[dict], path: Path):
  """Writes the scatter: each program's FLOPs and peak bytes against the formulas'."""
  from matplotlib.figure import Figure

  figure = Figure((9, 4.2))
  for axis, name, unit, most in zip(
    figure.subplots(1, 2), ("tflops", "bytes"), (1, 2**30), (0.03, 0.15), strict=True
  ):
    pairs = [(row[f"formula_{name}"] / unit, row[f"program_{name}"] / unit) for row in rows]
    ends = min(map(min, pairs)) * 0.7, max(map(max, pairs)) * 1.4
    axis.fill_between(
      ends, [end * (1 - most) for end in ends], [end * (1 + most) for end in ends], color="#dddddd"
    )
    axis.plot(ends, ends, color="#888888", lw=0.8)
    axis.scatter(*zip(*pairs, strict=True), s=14, color="#3b78b0", zorder=2)
    shown = {"tflops": "TFLOPs of a device and step", "bytes": "GiB of a device at the peak"}[name]
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=f"{shown}; grey: ±{most:.0%}")
    axis.set(xlabel="by formula", ylabel="by the compiler's program")
    axis.minorticks_off()  # their labels would overlap
  figure.tight_layout()
  figure.savefig(path, dpi=90)


def cpu_rows(repeat: int) -> list[dict]:
  """Plans, compiles and runs each case on one device.

  Args:
    repeat: steps, and products, of which the fastest counts.
  Returns:
    A row a case: the formula's bytes, the compiler's, what the process grew by; the formula's
    FLOPs at the rate of a large product in seconds, and the step's.
  """
  rate = matmul_rate(repeat)
  return [_row(changes, rate, repeat) for changes in CPU_CASES]


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
  found, sizes = compiled.memory_analysis(), axis_sizes(config.mesh, 1)
  return {
    "config": changes,
    "formula_bytes": memory(config, sizes).peak,
    "program_bytes": found.argument_size_in_bytes + found.temp_size_in_bytes,
    "grown_bytes": grown,
    "formula_s": sum(step_flops(config, sizes, "cpu")) / rate,
    "seconds_per_step": min(spent_s[1:]),
  }


def _status(name: str) -> int:
  """Bytes of this process by Linux's name for them."""
  return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
  main()
