"""Proves that `grouped_dot` is each run of rows times its group's weight, by every kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import grouped
from llmjax.core.grouped import KERNELS, grouped_dot

D, F = 6, 5
# Rows, and the rows of each group: what runs there can be.
RUNS = {
  "even": (12, [4, 4, 4]),
  "empty": (12, [0, 7, 0, 5, 0]),
  "one": (12, [0, 12, 0]),
  "few": (3, [0, 1, 0, 1, 0, 0, 1, 0]),
  "beyond": (12, [2, 0, 5]),
  "none": (4, [0, 0]),
  "blocks": (139, [3, 1, 64 + 16 + 1, 64 - 16 - 2]),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """So that few rows are several blocks."""
  monkeypatch.setattr(grouped, "BLOCKS", (64, 16))


def operands(t, sizes, dtype=np.float32):
  rng = np.random.default_rng(0)
  x, w, grad = rng.normal(size=(t, D)), rng.normal(size=(len(sizes), D, F)), rng.normal(size=(t, F))
  return jnp.asarray(x, dtype), jnp.asarray(w, np.float32), jnp.asarray(grad, dtype)


def slow(x, w, sizes, grad):
  """(y, gradient of x, gradient of w) in float64, a row at a time."""
  x, w, grad = (np.asarray(a, np.float64) for a in (x, w, grad))
  y, grad_x, grad_w = np.zeros((len(x), F)), np.zeros_like(x), np.zeros_like(w)
  groups = [group for group, size in enumerate(sizes) for _ in range(size)]
  for row, group in enumerate(groups):
    for i in range(D):
      for j in range(F):
        y[row, j] += x[row, i] * w[group, i, j]
        grad_x[row, i] += grad[row, j] * w[group, i, j]
        grad_w[group, i, j] += x[row, i] * grad[row, j]
  return y, grad_x, grad_w


def run(kernel, x, w, sizes, grad):
  @jax.jit
  def both(x, w, sizes, grad):
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes, kernel), x, w)
    return y, *pull(grad)

  return both(x, w, jnp.asarray(sizes, jnp.int32), grad)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("name", RUNS)
def test_values_and_gradients_equal_a_loop_over_rows(name, kernel):
  t, sizes = RUNS[name]
  x, w, grad = operands(t, sizes)
  made = run(kernel, x, w, sizes, grad)
  want = in_runs(slow(x, w, sizes, grad), sizes)
  for mine, theirs, what in zip(in_runs(made, sizes), want, ("y", "x", "w"), strict=True):
    # Sums of 6 terms of order 1 (of up to 130 for a weight): some roundings of 2^-24 of 10.
    assert_allclose(mine, theirs, rtol=2e-6, atol=5e-6, err_msg=what)
  assert_array_equal(np.asarray(made[2])[np.array(sizes) == 0], 0)


def in_runs(made, sizes):
  """(y, gradients of x and of w), without the rows that are of no group."""
  y, grad_x, grad_w = made
  return y[: sum(sizes)], grad_x[: sum(sizes)], grad_w


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_what_stands_beyond_the_last_run_is_never_read(kernel):
  t, sizes = RUNS["beyond"]
  x, w, grad = operands(t, sizes)
  spoiled = x.at[sum(sizes) :].set(jnp.nan), w, sizes, grad.at[sum(sizes) :].set(jnp.nan)
  made, want = (in_runs(run(kernel, *given), sizes) for given in (spoiled, (x, w, sizes, grad)))
  for mine, clean in zip(made, want, strict=True):
    assert_array_equal(mine, clean)


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_bf16_is_summed_in_fp32_and_a_weights_gradient_comes_back_unrounded(kernel):
  t, sizes = RUNS["empty"]
  x, w, grad = operands(t, sizes, jnp.bfloat16)
  y, grad_x, grad_w = run(kernel, x, w, sizes, grad)
  assert (y.dtype, grad_x.dtype, grad_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  want_y, want_x, want_w = slow(x, w.astype(jnp.bfloat16), sizes, grad)
  # As in test_dot.py: one rounding to 8 bits is at most 2^-8 of the value; sums are fp32.
  assert_allclose(np.asarray(y, np.float64), want_y, rtol=2**-8, atol=2e-5)
  assert_allclose(np.asarray(grad_x, np.float64), want_x, rtol=2**-8, atol=2e-5)
  assert_allclose(grad_w, want_w, rtol=1e-6, atol=2e-5)


def test_auto_is_blocks_on_a_cpu():
  t, sizes = RUNS["even"]
  x, w, grad = operands(t, sizes)
  for auto, blocks in zip(
    run("auto", x, w, sizes, grad), run("blocks", x, w, sizes, grad), strict=True
  ):
    assert_array_equal(auto, blocks)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tiles_of_the_tpus_kernel_fit_its_fast_memory(dtype):
  """Two of each operand's and the result's tiles and one fp32 sum: in 16 MiB, a kernel's share."""
  x_td, size = jnp.zeros((512, 2048), dtype), jnp.dtype(dtype).itemsize
  tiles = lambda made: grouped._tiles(x_td, 2048, made)[1]  # noqa: E731
  t, d, f = tiles(dtype)
  assert 2 * size * (t * d + d * f + t * f) + 4 * t * f < 2**24
  t, d, f = tiles(jnp.float32)  # of a weight's gradient
  assert 2 * (size * (t * d + t * f) + 4 * d * f) + 4 * d * f < 2**24
