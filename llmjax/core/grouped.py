"""`grouped_dot`: rows in runs, each run times the weight of its own group.

What `core.dot` is for one weight, this is for a stack of experts. A TPU has a kernel for it. On a
CPU it goes through each run in blocks of rows: XLA has `ragged_dot` there as a product with every
expert's weight.
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.core.platform import platform

KERNELS = ("auto", "blocks", "ragged", "megablox")
BLOCK = 128  # rows of one product; a run wastes half of one on average
TILE = (512, 1024, 1024)  # rows, summed over, made: of one step of the TPU's kernel


def grouped_dot(x_td, w_edf, sizes_e, kernel: str = "auto"):
  """Multiplies each run of rows with its group's weight.

  Args:
    x_td: rows, those of group 0 first.
    w_edf: a weight for each group, any float dtype; cast to the dtype of `x_td`.
    sizes_e: int32 rows of each group; their sum may be less than t.
    kernel: blocks; ragged (`jax.lax.ragged_dot`); megablox (Pallas, TPU; interpreted elsewhere);
      auto is blocks on CPU, megablox on TPU, ragged on GPU.
  Returns:
    y_tf in the dtype of `x_td`, summed in fp32; zeros in rows that are of no group.
  """
  if kernel == "auto":
    kernel = {"cpu": "blocks", "tpu": "megablox"}.get(platform(), "ragged")
  y_tf = _grouped(kernel, x_td, w_edf, sizes_e)
  real_t1 = jnp.arange(len(x_td))[:, None] < sizes_e.sum()
  return jnp.where(real_t1, y_tf, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(kernel, x_td, w_edf, sizes_e):
  return _forward(kernel, x_td, w_edf, sizes_e)[0]


def _forward(kernel, x_td, w_edf, sizes_e):
  low_edf = w_edf.astype(x_td.dtype)
  residuals = (x_td, low_edf, sizes_e, jnp.zeros((), w_edf.dtype))
  return _MULTIPLY[kernel](x_td, low_edf, sizes_e), residuals


def _backward(kernel, residuals, grad_tf):
  """Written out because jax would round a weight's gradient to the dtype of its rows."""
  x_td, low_edf, sizes_e, like = residuals
  grad_tf = grad_tf.astype(x_td.dtype)
  grad_x = _MULTIPLY[kernel](grad_tf, low_edf, sizes_e, transposed=True)
  real_t1 = jnp.arange(len(x_td))[:, None] < sizes_e.sum()
  grad_w = _OUTER[kernel](x_td, grad_tf, sizes_e)
  return jnp.where(real_t1, grad_x, 0), grad_w.astype(like.dtype), None


_grouped.defvjp(_forward, _backward)


def _ragged(x_td, w_edf, sizes_e, transposed: bool = False):
  if transposed:
    w_edf = w_edf.swapaxes(1, 2)
  y_tf = jax.lax.ragged_dot(x_td, w_edf, sizes_e, preferred_element_type=jnp.float32)
  return y_tf.astype(x_td.dtype)


def _ragged_outer(x_td, grad_tf, sizes_e):
  """As `_outer`: the rows are what is summed over."""
  rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(
    x_td, grad_tf, sizes_e, rows, preferred_element_type=jnp.float32
  )


def _megablox(x_td, w_edf, sizes_e, transposed: bool = False):
  # Here, because Pallas takes longer to import than the rest of the library.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  width = w_edf.shape[1 if transposed else 2]
  padded_td, tiling, interpret = _tiles(x_td, width)
  y_tf = gmm(
    padded_td, w_edf, sizes_e, x_td.dtype, tiling, transpose_rhs=transposed, interpret=interpret
  )
  return y_tf[: len(x_td)]


def _megablox_outer(x_td, grad_tf, sizes_e):
  """As `_outer`."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  padded_td, tiling, interpret = _tiles(x_td, grad_tf.shape[1])
  grad_tf = jnp.pad(grad_tf, ((0, len(padded_td) - len(grad_tf)), (0, 0)))
  return tgmm(padded_td.T, grad_tf, sizes_e, jnp.float32, tiling, interpret=interpret)


def _tiles(x_td, width: int):
  """(x with rows added to fill the last tile, the tile's sizes, whether to interpret)."""
  t, d = x_td.shape
  rows = min(TILE[0], _ceil(t, BLOCK) * BLOCK)
  padded_td = jnp.pad(x_td, ((0, -t % rows), (0, 0)))
  return padded_td, (rows, min(TILE[1], d), min(TILE[2], width)), platform() != "tpu"


def _multiply(x_td, w_edf, sizes_e, transposed: bool = False):
  """Writes block after block; what one writes past its run's end the next run writes over."""
  t = x_td.shape[0]
  block = min(BLOCK, t)
  eq = "td,fd->tf" if transposed else "td,df->tf"
  width = w_edf.shape[1 if transposed else 2]
  x_td = jnp.pad(x_td, ((0, block), (0, 0)))

  def group(y_tf, given):
    w_df, start, size = given

    def step(number, y_tf):
      at = start + number * block
      part = jax.lax.dynamic_slice_in_dim(x_td, at, block)
      made = jnp.einsum(eq, part, w_df, preferred_element_type=jnp.float32)
      return jax.lax.dynamic_update_slice_in_dim(y_tf, made.astype(y_tf.dtype), at, 0)

    return jax.lax.fori_loop(0, _ceil(size, block), step, y_tf), None

  y_tf = jnp.zeros((t + block, width), x_td.dtype)
  y_tf, _ = jax.lax.scan(group, y_tf, (w_edf, _starts(sizes_e), sizes_e))
  return y_tf[:t]


def _outer(x_td, grad_tf, sizes_e):
  """Sums x ⊗ grad over each run: the weights' gradient [e, d, f], fp32."""
  t = x_td.shape[0]
  block = min(BLOCK, t)
  x_td, grad_tf = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_td, grad_tf))

  def group(_, given):
    start, size = given

    def step(number, total_df):
      at = start + number * block
      real_t1 = (at + jnp.arange(block))[:, None] < start + size
      x, grad = (jax.lax.dynamic_slice_in_dim(a, at, block) for a in (x_td, grad_tf))
      x = jnp.where(real_t1, x, 0)
      return total_df + jnp.einsum("td,tf->df", x, grad, preferred_element_type=jnp.float32)

    zeros = jnp.zeros((x_td.shape[1], grad_tf.shape[1]), jnp.float32)
    return None, jax.lax.fori_loop(0, _ceil(size, block), step, zeros)

  return jax.lax.scan(group, None, (_starts(sizes_e), sizes_e))[1]


def _starts(sizes_e):
  return jnp.cumsum(sizes_e) - sizes_e


def _ceil(size, block: int):
  return (size + block - 1) // block


_MULTIPLY = {"blocks": _multiply, "ragged": _ragged, "megablox": _megablox}
_OUTER = {"blocks": _outer, "ragged": _ragged_outer, "megablox": _megablox_outer}
