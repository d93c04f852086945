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
  release = tuple(int(part) for part in jax_version.split(".")[:2])
  if platform != "cpu":
    return {}
  return {"xla_backend_optimization_level": 1 if release <= (0, 10) else 0}
