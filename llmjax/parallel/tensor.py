"""Megatron's column-parallel and row-parallel products on mesh axis `tensor`.

By hand, because a compiler left to itself adds up each product's part by itself: one sum for each
of query, key, value, gate and up going back, where one for all of them is enough. Here a half costs
one all-gather and one reduce-scatter of the residual stream in each direction.
"""

from collections.abc import Callable

import jax

from llmjax.parallel.rules import (
  ACTIVATIONS,
  has_sharded,
  inside,
  shard,
  shard_stream,
  shards,
  spec,
  stream_spec,
  weight_specs,
)


def column_parallel(project: Callable, x_btd, weights: dict, letters: tuple[str, ...]):
  """Multiplies the residual stream with weights whose columns are sharded over `tensor`.

  Args:
    project: (x_btd, weights) → a tuple of arrays, each device's own columns.
    x_btd: residual stream, as `shard_stream` lays it out.
    weights: by name; the name ends in the letters.
    letters: of what `project` returns.
  Returns:
    What `project` returns, sharded over `tensor`.
  Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3; with positions cut: Korthikanti et al.
    2022, arXiv:2205.05198, sec. 4.2.
  """
  axes, cut = _manual_axes(x_btd, weights)
  if not axes:
    return project(shard(x_btd, "btd"), weights)

  def local(x_btd, weights):
    x_btd = jax.lax.all_gather(x_btd, "tensor", axis=1, tiled=True) if cut else x_btd
    return project(x_btd, weights)

  return jax.shard_map(
    local,
    in_specs=(stream_spec(x_btd.shape[1]), weight_specs(weights)),
    out_specs=tuple(spec(text, ACTIVATIONS) for text in letters),
    axis_names=axes,
    check_vma=False,
  )(x_btd, weights)


def row_parallel(project: Callable, x, weights: dict, letters: str):
  """Multiplies an activation sharded over `tensor` with a weight whose rows are, and sums.

  Args:
    project: (x, weights) → y_btd, each device's part of a sum.
    x: activation.
    weights: by name; the name ends in the letters.
    letters: of `x`.
  Returns:
    y_btd, as `shard_stream` lays it out.
  Source: as of `columns`.
  """
  axes, cut = _manual_axes(x, weights)
  if not axes:
    return shard_stream(project(x, weights))

  def local(x, weights):
    y_btd = project(x, weights)
    if not cut:
      return y_btd
    return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True)

  return jax.shard_map(
    local,
    in_specs=(spec(letters, ACTIVATIONS), weight_specs(weights)),
    out_specs=stream_spec(x.shape[1]),
    axis_names=axes,
    check_vma=False,
  )(x, weights)


def _manual_axes(x, weights: dict) -> tuple[set[str], bool]:
  """(axes that the `shard_map` takes, whether `tensor` shards positions); none: leave it to XLA.

  It takes all that are left: where some were the compiler's, it would gather what a reduce-scatter
  takes over them. Where `tensor` does not divide the positions everything is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or inside("tensor"):
    return set(), False
  cut = mesh.shape["tensor"] > 1
  uneven = x.shape[1] % (shards("t", ACTIVATIONS) * mesh.shape["tensor"])
  if uneven if cut else not has_sharded(weights):
    return set(), False
  return {axis for axis in mesh.axis_names if not inside(axis)}, cut
