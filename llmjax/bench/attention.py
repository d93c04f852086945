"""Memory and time of attention, forward and backward, by number of positions and kernel.

Memory is what the compiler sets aside for temporaries, so it is known for lengths too long to run.
"""

import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.nn.kernels import attend
from llmjax.nn.mask import Rule, self_mask
from llmjax.nn.scores import Scores

POSITIONS = (512, 1024, 2048, 4096, 8192, 16384)
_HEADS, _HEAD_DIM = 2, 64


def _causal(kernel: str, q_btnh, k_bskh, v_bskh):
  positions_bt = jnp.arange(q_btnh.shape[1])[None]
  mask = self_mask(Rule(), None, positions_bt)
  return attend(q_btnh, k_bskh, v_bskh, mask, Scores(_HEAD_DIM**-0.5), kernel)


# Causal attention by name, (q_btnh, k_bskh, v_bskh) -> o_btnh.
KERNELS: dict[str, Callable] = {
  name: functools.partial(_causal, name) for name in ("direct", "blockwise")
}


def measure(options, positions=POSITIONS) -> dict:
  """Compiles and times every kernel at every length.

  Args:
    options: `dtype`, and `rounds` to take the fastest of.
    positions: lengths t = s.
  Returns:
    One case a kernel; a row holds `positions`, `temp_bytes`, and `seconds_per_step` unless it
    would not fit into half of the memory that is free.
  """
  cases = []
  for name, kernel in KERNELS.items():
    rows = [_row(kernel, length, options) for length in positions]
    cases.append(
      {
        "title": f"{name} attention, batch 1, {_HEADS} heads of {_HEAD_DIM}, forward and backward",
        "kernel": name,
        "rows": rows,
      }
    )
  return {"cases": cases}


def _row(kernel, length: int, options) -> dict:
  shape = (1, length, _HEADS, _HEAD_DIM)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, shape, jnp.dtype(options.dtype)) for key in keys)
  compiled = jax.jit(functools.partial(_gradient, kernel)).lower(q, k, v).compile()
  row = {"positions": str(length), "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
  if row["temp_bytes"] < _free_bytes() / 2:
    jax.block_until_ready(compiled(q, k, v))
    times = []
    for _ in range(options.rounds):
      began_s = time.perf_counter()
      jax.block_until_ready(compiled(q, k, v))
      times.append(time.perf_counter() - began_s)
    row["seconds_per_step"] = min(times)
  return row


def _gradient(kernel, q, k, v):
  loss = lambda q, k, v: jnp.sum(jnp.square(kernel(q, k, v).astype(jnp.float32)))  # noqa: E731
  return jax.grad(loss, (0, 1, 2))(q, k, v)


def _free_bytes() -> int:
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
