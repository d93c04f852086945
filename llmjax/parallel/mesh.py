"""The device mesh: named axes over the devices of a run, within and across slices.

`data` holds whole copies; `fsdp` cuts weights along the residual width and rows of the batch;
`stage` cuts layers; `context` positions; `expert` experts (what has none sees it as more `data`);
`tensor` heads, feed-forward width and vocabulary. Neighbours on the last axes are near each other.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from llmjax.core.errors import UserError, nearest
from llmjax.parallel.channels import separate_channels

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 in one place stands for all that are left.

  Attributes:
    data: copies of the model.
    fsdp: ways that weights, gradients and optimizer state are cut (see `train.zero_stage`).
    stage: pipeline stages.
    context: ways that a row's positions are cut.
    expert: ways that experts are cut.
    tensor: ways that heads, feed-forward width and vocabulary are cut.
    slices: groups of devices with a slow network between them; 0 means as many as there are.
    across: the axis that runs across slices, `data` or `stage`; all others stay inside one.
  """

  data: int = -1
  fsdp: int = 1
  stage: int = 1
  context: int = 1
  expert: int = 1
  tensor: int = 1
  slices: int = 0
  across: str = "data"

  def __post_init__(self):
    if self.across not in ("data", "stage"):
      raise UserError(f"mesh.across {self.across!r}; {nearest(self.across, ('data', 'stage'))}")
    if self.slices < 0:
      raise UserError(f"mesh.slices {self.slices} is negative")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Lays devices out on the named axes.

  Args:
    devices: all of the run's by default.
  Returns:
    A mesh whose axes are all `AxisType.Auto`.
  Raises:
    UserError: the axes' product is not the number of devices, or slices do not divide their axis.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = axis_sizes(config, len(devices))
  grid = device_grid(devices, sizes, config.slices, config.across)
  if len(devices) > 1 and devices[0].platform == "cpu":
    separate_channels()
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class _StandIn:
  """A device that is not at hand."""

  slice_index: int
  platform: str = ""


def abstract_mesh(
  config: MeshConfig, devices: int, slices: int = 1, platform: str = "cpu"
) -> AbstractMesh:
  """Makes the mesh of devices that need not be at hand.

  Args:
    config: sizes of the axes.
    devices: how many.
    slices: groups of them, of equal size, with the slow network between.
    platform: cpu, gpu, tpu.
  Raises:
    UserError: as `make_mesh` on such devices.
  """
  sizes = axis_sizes(config, devices)
  there = [_StandIn(number * slices // devices) for number in range(devices)]
  device_grid(there, sizes, config.slices, config.across)
  return AbstractMesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES),
    abstract_device=AbstractDevice(platform, None, platform),
  )


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
  """Fills in the -1 of a mesh for a number of devices.

  Raises:
    UserError: the axes' product is not the number of devices.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  shown = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1"
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"mesh {shown}: sizes are at least 1, and at most one may be -1")
  if rest:
    sizes[rest[0]] = devices // math.prod(size for size in sizes.values() if size != -1)
  if math.prod(sizes.values()) != devices:
    raise UserError(f"mesh {shown} does not divide the {devices} devices there are")
  return sizes


def device_grid(devices: Sequence, sizes: dict[str, int], slices: int, across: str) -> np.ndarray:
  """Makes the grid of devices.

  Args:
    sizes: of every axis, in the order of `AXES`.
    slices: how many; 0 counts those that devices say they are of.
    across: the axis they follow each other along.
  Returns:
    Array of devices, an axis for each of `AXES`.
  Raises:
    UserError: the slices do not divide that axis, or are not of equal size.
  """
  groups = _slices(devices, slices)
  if across != MeshConfig.across and len(groups) == 1:
    raise UserError(f"mesh.across={across} changes nothing: all devices are of one slice")
  if sizes[across] % len(groups):
    raise UserError(f"mesh.{across} {sizes[across]} is not a multiple of the {len(groups)} slices")
  shape = [size // len(groups) if axis == across else size for axis, size in sizes.items()]
  return np.concatenate([_inside(group, shape) for group in groups], axis=AXES.index(across))


def _slices(devices, count: int) -> list[list]:
  """Groups devices by the slice they say they are of, else into runs of equal length."""
  number = lambda device: getattr(device, "slice_index", None) or 0  # noqa: E731
  groups = [list(group) for _, group in itertools.groupby(sorted(devices, key=number), number)]
  if count and len(groups) not in (1, count):
    raise UserError(f"mesh.slices {count}, but the devices are of {len(groups)} slices")
  if len(groups) == 1 and count:
    size = max(1, len(devices) // count)
    groups = [devices[i : i + size] for i in range(0, len(devices), size)]
  if len({len(group) for group in groups}) > 1 or count not in (0, len(groups)):
    raise UserError(f"{len(devices)} devices are not {count or len(groups)} slices of equal size")
  return groups


def _inside(devices, shape) -> np.ndarray:
  """One slice's grid; on TPU the library puts neighbours on neighbouring chips."""
  if devices[0].platform == "tpu" and len(devices) > 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return np.array(devices, object).reshape(shape)
