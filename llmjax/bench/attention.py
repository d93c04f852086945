"""Memory and time of attention, forward and backward, by number of positions and kernel.

Memory is what the compiler sets aside for temporaries, so it is known for lengths too long to run.
"""

import functools
import os
import timeit

import jax
import jax.numpy as jnp

from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import MaskSpec, self_mask
from llmjax.nn.attention.scores import Scores

POSITIONS = (512, 1024, 2048, 4096, 8192, 16384)
KERNELS = ("direct", "blockwise")
_HEADS, _HEAD_DIM = 2, 64


def measure(options, positions=POSITIONS) -> dict:
  """Compiles and times every kernel at every length.

  Args:
    options: `dtype`, and `rounds` to take the fastest of.
    positions: lengths t = s.
  Returns:
    One case a kernel; a row holds `positions`, `temp_bytes`, and `seconds_per_step` unless it
    would not fit into half of the memory that is free.
  """
  title = f"attention, batch 1, {_HEADS} heads of {_HEAD_DIM}, forward and backward"
  rows = {kernel: [_row(kernel, length, options) for length in positions] for kernel in KERNELS}
  cases = [{"title": f"{name} {title}", "kernel": name, "rows": rows[name]} for name in KERNELS]
  return {"cases": cases}


def _row(kernel: str, length: int, options) -> dict:
  shape = (1, length, _HEADS, _HEAD_DIM)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, shape, jnp.dtype(options.dtype)) for key in keys)
  compiled = jax.jit(functools.partial(_gradient, kernel)).lower(q, k, v).compile()
  row = {"positions": str(length), "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
  free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if row["temp_bytes"] < free_bytes / 2:
    step = lambda: jax.block_until_ready(compiled(q, k, v))  # noqa: E731
    step()
    row["seconds_per_step"] = min(timeit.repeat(step, number=1, repeat=options.rounds))
  return row


def _gradient(kernel: str, q_btnh, k_bskh, v_bskh):
  """The gradient of the sum of squares of causal attention."""
  mask = self_mask(MaskSpec(), None, jnp.arange(q_btnh.shape[1])[None])

  def loss(q_btnh, k_bskh, v_bskh):
    o_btnh = attend(q_btnh, k_bskh, v_bskh, mask, Scores(_HEAD_DIM**-0.5), kernel)
    return jnp.sum(jnp.square(o_btnh.astype(jnp.float32)))

  return jax.grad(loss, (0, 1, 2))(q_btnh, k_bskh, v_bskh)
