"""What differs between the jax releases we run on: 0.10 (Python 3.11) and 0.12 (Python ≥ 3.12).

The only file that asks for a version. Each function says which releases differ and how, and goes
when the older one does.
"""

import jax


def same_bits_options(platform: str, jax_version: str = jax.__version__) -> dict[str, int]:
  """Compiler options under which elementwise code gives the same bits however it is sharded.

  Up to jax 0.10 XLA's CPU backend does so by itself, and at LLVM's level 1 with the same bits: what
  runs once then takes half as long to compile. In 0.12 it rounds a product and the sum it goes into
  once or twice, as the shape of a device's shard has it vectorized, so that `exp`, `log`, `erf_inv`
  and polynomials differ in the last bit between meshes. Level 0 rounds each.

  Args:
    platform: of the devices that run the code, such as `cpu`.
    jax_version: release of jax, the installed one by default.
  Returns:
    Options for `jax.jit(…, compiler_options=…)`, for what runs once.
  """
  if platform != "cpu":
    return {}
  return {"xla_backend_optimization_level": 1 if _release(jax_version) <= (0, 10) else 0}


def cpu_mesh_options(jax_version: str = jax.__version__) -> dict[str, str | bool]:
  """Compiler options under which a program for several CPU devices runs correctly.

  Instructions keep the order that needs least memory. In the order XLA prefers on a CPU, which runs
  many at once, arrays are overwritten before they are read: weights came out NaN in six steps of
  seven where dropout, remat and the ring meet.

  In jax 0.12 XLA orders two collectives only by when they begin, and a conditional or a loop counts
  as begun before the collectives inside it are: once the executor has handed half of its ready
  instructions to another thread, one device may enter a later collective while its neighbour still
  waits in an earlier one, for ever. Without a pool of threads for one device's instructions nothing
  is handed over, and collectives keep the order of the program. Devices still run in parallel.

  Args:
    jax_version: release of jax, the installed one by default.
  """
  options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  if _release(jax_version) > (0, 10):
    options["xla_cpu_multi_thread_eigen"] = False
  return options


def _release(jax_version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in jax_version.split(".")[:2])
