"""`grouped_dot`: rows sorted by group, each times its group's weight, as for a stack of experts. A
TPU has a kernel for it. On a CPU each group's rows are multiplied in blocks: XLA's `ragged_dot`
multiplies by every weight there."""

import functools

import jax
import jax.numpy as jnp

from llmjax.core.platform import platform
from llmjax.core.weight import cast, decode, grad_dtype, pull, summands

KERNELS = ("auto", "blocks", "ragged", "megablox")
BLOCKS = (256, 64)  # rows of one product on a CPU; a group wastes half a small one on average
TILE = (512, 1024, 1024)  # rows, contracted and output channels of one step of the TPU's kernel


def grouped_dot(x_td, w_edf, sizes_e, kernel: str = "auto"):
  """Multiplies each group of rows with the group's weight.

  Args:
    x_td: rows, those of group 0 first.
    w_edf: a weight for each group, of any kind; cast to the dtype of `x_td`.
    sizes_e: int32 rows of each group; their sum may be less than t.
    kernel: blocks; ragged (`jax.lax.ragged_dot`); megablox (Pallas, TPU; interpreted elsewhere);
      auto is blocks on CPU, megablox on TPU, ragged on GPU.
  Returns:
    y_tf in the dtype of `x_td`, summed in fp32. Rows beyond the last group are undefined, so that
    no pass over all rows is needed; neither they nor their gradients reach a weight.
  """
  if kernel == "auto":
    kernel = {"cpu": "blocks", "tpu": "megablox"}.get(platform(), "ragged")
  total = None
  for term in summands(w_edf):
    if isinstance(term, tuple):
      factor, (a_eda, b_eaf), _ = term
      y_tf = factor * _grouped(kernel, _grouped(kernel, x_td, a_eda, sizes_e), b_eaf, sizes_e)
    else:
      y_tf = _grouped(kernel, x_td, term, sizes_e)
    total = y_tf if total is None else total + y_tf
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(kernel, x_td, w_edf, sizes_e):
  return _forward(kernel, x_td, w_edf, sizes_e)[0]


def _forward(kernel, x_td, w_edf, sizes_e):
  low_edf = cast(w_edf, x_td.dtype)
  like = jax.tree.map(lambda array: jnp.zeros((), array.dtype), w_edf)
  y_tf = _MULTIPLY[kernel](x_td, decode(low_edf, x_td.dtype), sizes_e)
  return y_tf, (x_td, low_edf, sizes_e, like)


def _backward(kernel, residuals, grad_tf):
  """Written out because jax would round a weight's gradient to the dtype of its rows."""
  x_td, low_edf, sizes_e, like = residuals
  grad_tf = grad_tf.astype(x_td.dtype)
  grad_x = _MULTIPLY[kernel](grad_tf, decode(low_edf, x_td.dtype), sizes_e, transposed=True)
  grad_w = _OUTER[kernel](x_td, grad_tf, sizes_e, grad_dtype(low_edf, like))
  return grad_x, pull(low_edf, grad_w, like), None


_grouped.defvjp(_forward, _backward)


def _ragged(x_td, w_edf, sizes_e, transposed: bool = False):
  if transposed:
    w_edf = w_edf.swapaxes(1, 2)
  y_tf = jax.lax.ragged_dot(x_td, w_edf, sizes_e, preferred_element_type=jnp.float32)
  return y_tf.astype(x_td.dtype)


def _ragged_outer(x_td, grad_tf, sizes_e, dtype):
  rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  grad_edf = jax.lax.ragged_dot_general(
    x_td, grad_tf, sizes_e, rows, preferred_element_type=jnp.float32
  )
  return grad_edf.astype(dtype)


def _megablox(x_td, w_edf, sizes_e, transposed: bool = False):
  # Here, because Pallas takes longer to import than the rest of the library.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  width = w_edf.shape[1 if transposed else 2]
  padded_td, tiling, interpret = _tiles(x_td, width, x_td.dtype)
  y_tf = gmm(
    padded_td, w_edf, sizes_e, x_td.dtype, tiling, transpose_rhs=transposed, interpret=interpret
  )
  return y_tf[: len(x_td)]


def _megablox_outer(x_td, grad_tf, sizes_e, dtype):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  padded_td, tiling, interpret = _tiles(x_td, grad_tf.shape[1], dtype)
  grad_tf = jnp.pad(grad_tf, ((0, len(padded_td) - len(grad_tf)), (0, 0)))
  return tgmm(padded_td.T, grad_tf, sizes_e, jnp.dtype(dtype), tiling, interpret=interpret)


def _tiles(x_td, width: int, out_dtype):
  """(x padded to a multiple of the tile's rows, the tile's sizes, whether to interpret). Tiles of a
  wide `out_dtype` are narrower: two of each operand and a sum share 16 MiB of VMEM."""
  t, d = x_td.shape
  rows = min(TILE[0], _ceil(t, 128) * 128)
  padded_td = jnp.pad(x_td, ((0, -t % rows), (0, 0)))
  most = TILE[2] * 2 // jnp.dtype(out_dtype).itemsize
  return padded_td, (rows, min(TILE[1], d), min(most, width)), platform() != "tpu"


def _multiply(x_td, w_edf, sizes_e, transposed: bool = False):
  eq = "td,fd->tf" if transposed else "td,df->tf"

  def group(y_tf, given):
    w_df, start, size = given

    def step(y_tf, at, block, in_group_t):
      out = jnp.einsum(eq, _rows(x_td, at, block), w_df, preferred_element_type=jnp.float32)
      out = out.astype(y_tf.dtype)
      if in_group_t is not None:
        out = jnp.where(in_group_t[:, None], out, _rows(y_tf, at, block))
      return jax.lax.dynamic_update_slice_in_dim(y_tf, out, at, 0)

    return _over_blocks(step, y_tf, start, size, len(x_td)), None

  y_tf = jnp.zeros((len(x_td), w_edf.shape[1 if transposed else 2]), x_td.dtype)
  return jax.lax.scan(group, y_tf, (w_edf, _starts(sizes_e), sizes_e))[0]


def _outer(x_td, grad_tf, sizes_e, dtype):
  """Sums x ⊗ grad over each group in fp32: the weights' gradient [e, d, f]."""
  x_dt = jax.lax.optimization_barrier(x_td.T)  # else each block's product transposes its own rows

  def group(_, given):
    start, size = given

    def step(total_df, at, block, in_group_t):
      pair = jax.lax.dynamic_slice_in_dim(x_dt, at, block, axis=1), _rows(grad_tf, at, block)
      if in_group_t is not None:
        pair = jnp.where(in_group_t, pair[0], 0), jnp.where(in_group_t[:, None], pair[1], 0)
      return total_df + jnp.einsum("dt,tf->df", *pair, preferred_element_type=jnp.float32)

    zeros_df = jnp.zeros((len(x_dt), grad_tf.shape[1]), jnp.float32)
    return None, _over_blocks(step, zeros_df, start, size, len(x_td))

  return jax.lax.scan(group, None, (_starts(sizes_e), sizes_e))[1].astype(dtype)


def _over_blocks(step, carry, start, size, t: int):
  """Loops over a group in large blocks, then small ones, of which the last may be partly filled.

  Args:
    step: (carry, first row, rows, bool for those of the group; None: all are) → carry.
    t: rows of all groups; a block that would reach beyond them begins earlier.
  """
  blocks = [block for block in BLOCKS if block <= t] or [t]
  for block in blocks:
    filled = block > blocks[-1]

    def body(number, carry, block=block, filled=filled, start=start, end=start + size):
      at = start + number * block
      if filled:
        return step(carry, at, block, None)
      first = jnp.minimum(at, t - block)
      row_t = first + jnp.arange(block)
      return step(carry, first, block, (row_t >= at) & (row_t < end))

    count = size // block if filled else _ceil(size, block)
    carry = jax.lax.fori_loop(0, count, body, carry)
    start, size = start + count * block, size - count * block
  return carry


def _rows(x_td, at, block: int):
  return jax.lax.dynamic_slice_in_dim(x_td, at, block)


def _starts(sizes_e):
  return jnp.cumsum(sizes_e) - sizes_e


def _ceil(size, block: int):
  return (size + block - 1) // block


_MULTIPLY = {"blocks": _multiply, "ragged": _ragged, "megablox": _megablox}
_OUTER = {"blocks": _outer, "ragged": _ragged_outer, "megablox": _megablox_outer}
