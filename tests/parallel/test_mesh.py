"""Proves that a mesh has the asked-for axes on its devices, or names what does not fit."""

import jax
import pytest
from jax.sharding import AxisType

from llmjax.core.errors import UserError
from llmjax.parallel.mesh import MeshConfig, make_mesh

ONE = jax.devices()[:1]


@pytest.mark.parametrize(
  "config",
  [MeshConfig(), MeshConfig(data=1), MeshConfig(1, -1, 1), MeshConfig(1, 1, -1)],
)
def test_one_device_fits_every_axis_of_size_one(config):
  mesh = make_mesh(config, ONE)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_minus_one_stands_for_what_is_left():
  assert dict(make_mesh(MeshConfig(-1, 2, 3), ONE * 12).shape)["data"] == 2
  assert dict(make_mesh(MeshConfig(2, -1, 3), ONE * 12).shape)["fsdp"] == 2


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, 2, 1), (1, 1, 3)])
def test_a_mesh_that_does_not_divide_the_devices_names_both_numbers(sizes):
  with pytest.raises(UserError, match=r"data .* fsdp .* tensor .* the 1 devices"):
    make_mesh(MeshConfig(*sizes), ONE)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_sizes_that_mean_nothing_are_user_errors(sizes):
  with pytest.raises(UserError, match="at most one may be -1"):
    make_mesh(MeshConfig(*sizes), ONE)
