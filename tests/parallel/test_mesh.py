"""Proves that a mesh has the asked-for axes on its devices, or names what does not fit."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from llmjax.core.errors import UserError
from llmjax.parallel.mesh import AXES, MeshConfig, axis_sizes, device_grid, make_mesh

ONE = jax.devices()[:1]


def _devices(count, slices=1):
  return [
    types.SimpleNamespace(id=i, platform="cpu", slice_index=i * slices // count)
    for i in range(count)
  ]


@pytest.mark.parametrize(
  "config",
  [MeshConfig(), MeshConfig(data=1), MeshConfig(data=1, fsdp=-1), MeshConfig(data=1, tensor=-1)],
)
def test_one_device_fits_every_axis_of_size_one(config):
  mesh = make_mesh(config, ONE)
  assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_minus_one_stands_for_what_is_left():
  assert axis_sizes(MeshConfig(fsdp=2, tensor=3), 12)["data"] == 2
  assert axis_sizes(MeshConfig(data=2, fsdp=-1, stage=3), 12)["fsdp"] == 2


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": 2}, {"data": 1, "stage": 3}])
def test_a_mesh_that_does_not_divide_the_devices_names_both_numbers(sizes):
  axis, size = list(sizes.items())[-1]
  with pytest.raises(UserError, match=rf"mesh.* {axis} {size}.*does not divide the 1 devices"):
    make_mesh(MeshConfig(**sizes), ONE)


@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"data": 0}, {"data": 1, "fsdp": -2}])
def test_sizes_that_mean_nothing_are_user_errors(sizes):
  with pytest.raises(UserError, match="at most one may be -1"):
    make_mesh(MeshConfig(**sizes), ONE)


def _grid(config, devices):
  return device_grid(devices, axis_sizes(config, len(devices)), config.slices, config.across)


@pytest.mark.parametrize("across", ["data", "stage"])
@pytest.mark.parametrize("told", [0, 2])
def test_only_one_axis_crosses_slices(across, told):
  sizes = {"data": 2, "fsdp": 2, "stage": 2, "tensor": 2}
  config = MeshConfig(**sizes, slices=told, across=across)
  grid = _grid(config, _devices(16, slices=2))
  assert sorted(device.id for device in grid.flat) == list(range(16))
  slices = np.vectorize(lambda device: device.slice_index)(grid)
  for number, axis in enumerate(AXES):
    changes = np.any(np.diff(slices, axis=number))
    assert changes == (axis == across), axis


def test_slices_are_made_where_devices_know_of_none():
  grid = _grid(MeshConfig(data=4, tensor=2, slices=2), _devices(8))
  ids = np.vectorize(lambda device: device.id)(grid).reshape(4, 2)
  assert sorted(ids[:2].flat) == [0, 1, 2, 3]


def test_slices_that_do_not_fit_are_named():
  with pytest.raises(UserError, match=r"mesh.data 1 is not a multiple of the 2 slices"):
    _grid(MeshConfig(data=1, fsdp=8), _devices(8, slices=2))
  with pytest.raises(UserError, match=r"mesh.slices 4, but the devices are in 2 slices"):
    _grid(MeshConfig(data=8, slices=4), _devices(8, slices=2))
  for devices in (10, 9):  # five groups of two, and four of two with one left
    with pytest.raises(UserError, match=rf"{devices} devices are not 4 slices of equal size"):
      _grid(MeshConfig(slices=4), _devices(devices))
  with pytest.raises(UserError, match=r"mesh.across 'tensor'"):
    MeshConfig(across="tensor")
