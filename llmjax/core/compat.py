"""Differences between the supported jax releases: 0.10 (Python 3.11) and 0.12 (Python ≥ 3.12). The
only file that asks for a version; a function goes when the older release does."""

import jax


def same_bits_options(platform: str, jax_version: str = jax.__version__) -> dict[str, int]:
  """Compiler options under which elementwise code gives the same bits for every sharding.

  XLA's CPU backend in jax 0.10 does so at LLVM level 1, which compiles in half the time. In 0.12 it
  rounds a product and sum once or twice depending on how a shard's shape vectorizes, so that `exp`,
  `log`, `erf_inv` and polynomials differ in the last bit between meshes; level 0 rounds each.

  Args:
    platform: of the devices that run the code, such as `cpu`.
    jax_version: release of jax, the installed one by default.
  Returns:
    Options for `jax.jit(…, compiler_options=…)`, meant for code that runs once.
  """
  if platform != "cpu":
    return {}
  release = tuple(int(number) for number in jax_version.split(".")[:2])
  return {"xla_backend_optimization_level": 1 if release <= (0, 10) else 0}
