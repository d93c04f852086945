"""The device mesh: named axes over the devices of a run.

Axes are `data` (whole copies), `fsdp` (weights cut along the residual width) and `tensor` (weights
cut along heads, feed-forward width and vocabulary). Any axis may be 1; one may be -1, the rest.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llmjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 in one place stands for all that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Lays devices out on the named axes.

  Args:
    config: size of each axis.
    devices: devices to use, all of the run's by default.
  Returns:
    A mesh whose axes are all `AxisType.Auto`.
  Raises:
    UserError: the axes' product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  shown = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"mesh {shown}: sizes are at least 1, and at most one may be -1")
  given = math.prod(size for size in sizes.values() if size != -1)
  if rest:
    sizes[rest[0]] = len(devices) // given
  if math.prod(sizes.values()) != len(devices):
    raise UserError(f"mesh {shown} does not divide the {len(devices)} devices there are")
  grid = np.asarray(devices).reshape(tuple(sizes.values()))
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
