"""Collectives read from programs that XLA's CPU backend compiled; what they must be is known.

Per-device shapes below are worked out by hand: a global [64, 32] fp32 array is 8,192 bytes.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.parallel.collectives import collectives, describe, summary
from llmjax.parallel.mesh import MeshConfig, make_mesh

WHOLE = 64 * 32 * 4
EVERYWHERE = P()


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def _text(mesh, function, *specs, out=EVERYWHERE):
  """Compiles a function of arrays laid out by `specs`, manual over the mesh."""
  arguments = [
    jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
    for spec in specs
  ]
  manual = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
  return jax.jit(manual).lower(*arguments).compile().as_text()


def _read(mesh, *args, **kwargs):
  found = collectives(_text(mesh, *args, **kwargs), mesh)
  return [(one.kind, one.axes, one.bytes, one.count) for one in found]


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("data", "tensor"), ("fsdp", "tensor")])
def test_psum(mesh, axes):
  found = _read(mesh, lambda x: lax.psum(x, axes), P("data"), out=P("data"))
  assert found == [("all-reduce", axes, WHOLE // 2, 1)]


def test_combined_psums_add_up(mesh):
  def both(x, y):
    return lax.psum((x, y), "tensor")

  found = _read(mesh, both, P("tensor"), P(("fsdp", "tensor")))
  assert sum(size * count for *_, size, count in found) == WHOLE // 2 + WHOLE // 4
  assert {(kind, axes) for kind, axes, *_ in found} == {("all-reduce", ("tensor",))}


def test_all_gather_has_the_bytes_of_its_result(mesh):
  def gather(x):
    return lax.all_gather(x, "fsdp", tiled=True)

  found = _read(mesh, gather, P(("fsdp", "tensor")), out=P("tensor"))
  assert found == [("all-gather", ("fsdp",), WHOLE // 2, 1)]


def test_psum_scatter_has_the_bytes_of_its_operand(mesh):
  def scatter(x):
    return lax.psum_scatter(x, ("data", "fsdp"), tiled=True)

  found = _read(mesh, scatter, P(), out=P(("data", "fsdp")))
  assert found == [("reduce-scatter", ("data", "fsdp"), WHOLE, 1)]


def test_all_to_all(mesh):
  def exchange(x):
    return lax.all_to_all(x, "data", split_axis=1, concat_axis=0, tiled=True)

  found = _read(mesh, exchange, P("data"), out=P(None, "data"))
  assert found == [("all-to-all", ("data",), WHOLE // 2, 1)]


@pytest.mark.parametrize("axes", [("tensor",), ("data", "fsdp")])
def test_a_ring_of_permutes(mesh, axes):
  ways = 2 ** len(axes)

  def shift(x):
    return lax.ppermute(x, axes, [(i, (i + 1) % ways) for i in range(ways)])

  found = _read(mesh, shift, P(axes), out=P(axes))
  assert found == [("collective-permute", axes, WHOLE // ways, 1)]


def test_axes_of_one_device_are_never_named():
  mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
  assert _read(mesh, lambda x: lax.psum(x, ("data", "fsdp")), P()) == [
    ("all-reduce", ("fsdp",), WHOLE, 1)
  ]
  assert _read(mesh, lambda x: lax.psum(x, ("data", "tensor")), P()) == []


def _scan(function, length, **kwargs):
  return lambda x: lax.scan(lambda x, _: (function(x), None), x, None, length, **kwargs)[0]


def _step(x):
  return jnp.tanh(lax.psum(x, "tensor"))


def test_a_scan_multiplies_by_its_length(mesh):
  assert _read(mesh, _scan(_step, 5), P()) == [("all-reduce", ("tensor",), WHOLE, 5)]


def test_nested_scans_multiply(mesh):
  def outer(x):
    return jnp.sin(lax.psum(_scan(_step, 5)(x), "data"))

  found = sorted(_read(mesh, _scan(outer, 3), P()))
  assert found == [("all-reduce", ("data",), WHOLE, 3), ("all-reduce", ("tensor",), WHOLE, 15)]


def test_an_unrolled_scan_runs_as_many_collectives(mesh):
  found = collectives(_text(mesh, _scan(_step, 6, unroll=2), P()), mesh)
  assert summary(found) == {("all-reduce", ("tensor",)): 6 * WHOLE}
  assert describe(found) == "all-reduce tensor 48.00 KiB in 6"


def test_both_branches_of_a_conditional_count(mesh):
  def either(x):
    return lax.cond(x[0, 0] > 0, _step, lambda x: lax.psum(x * x, "data"), x)

  found = sorted(_read(mesh, either, P()))
  assert found == [("all-reduce", ("data",), WHOLE, 1), ("all-reduce", ("tensor",), WHOLE, 1)]


def test_the_partitioner_gathers_weights_cut_along_fsdp(mesh):
  """No line of source asks for it: each of 4 layers' weights [32, 32] is gathered."""

  def layers(w_ldd, x_bd):
    def layer(x_bd, w_dd):
      whole = lax.with_sharding_constraint(w_dd, NamedSharding(mesh, P()))
      return jnp.tanh(x_bd @ whole), None

    return lax.scan(layer, x_bd, w_ldd)[0]

  rows = NamedSharding(mesh, P("data"))
  w_ldd = jax.ShapeDtypeStruct(
    (4, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
  )
  x_bd = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
  compiled = jax.jit(layers, out_shardings=rows).lower(w_ldd, x_bd).compile()
  found = collectives(compiled.as_text(), mesh)
  assert summary(found) == {("all-gather", ("fsdp",)): 4 * 32 * 32 * 4}
  assert found[0].count == 4
