"""The device mesh: named axes over the devices of a run, within a slice and between slices. Devices
that are adjacent along the last axes are close to each other on the network."""

import dataclasses
import itertools
import math
import types
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.parallel.channels import separate_channels

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The size of each mesh axis; one of them may be -1, which takes the remaining devices.

  Attributes:
    data: data-parallel replicas of the model.
    fsdp: shards of weights, gradients and optimizer state (see `train.zero_stage`); data-parallel.
    stage: pipeline stages.
    context: shards of the sequence (context parallelism).
    expert: shards of the experts (expert parallelism); data-parallel for everything else.
    tensor: shards of heads, feed-forward width and vocabulary (tensor parallelism).
    slices: number of slices, connected by the data-center network; 0 asks the devices.
    across: the axis that spans slices, `data` or `stage`; all others stay within a slice.
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
    check_fields("mesh", self, across=("data", "stage"), slices=0)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Makes the mesh of a run.

  Args:
    devices: by default all that jax has.
  Returns:
    A mesh whose axes are all `AxisType.Auto`.
  Raises:
    UserError: the product of the axes is not the number of devices, or the slices do not divide
      the axis that spans them.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = axis_sizes(config, len(devices))
  grid = device_grid(devices, sizes, config.slices, config.across)
  if len(devices) > 1 and devices[0].platform == "cpu":
    separate_channels()
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(
  config: MeshConfig, devices: int, slices: int = 1, platform: str = "cpu"
) -> AbstractMesh:
  """Makes the mesh of devices that need not be present.

  Args:
    slices: number of slices of equal size.
    platform: cpu, gpu or tpu.
  Raises:
    UserError: as `make_mesh` on such devices.
  """
  sizes = axis_sizes(config, devices)
  stand_ins = [
    types.SimpleNamespace(slice_index=number * slices // devices, platform="")
    for number in range(devices)
  ]
  device_grid(stand_ins, sizes, config.slices, config.across)
  return abstract_devices(platform, **sizes)


def abstract_devices(platform: str, **sizes: int) -> AbstractMesh:
  """Makes a mesh of devices that need not be present; an axis that `sizes` does not name is 1."""
  shape, types = tuple(sizes.get(axis, 1) for axis in AXES), (AxisType.Auto,) * len(AXES)
  device = AbstractDevice(platform, None, platform)
  return AbstractMesh(shape, AXES, axis_types=types, abstract_device=device)


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
  """Returns the size of every axis, with -1 filled in.

  Raises:
    UserError: the product of the axes is not the number of devices.
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
  """Arranges the devices of a mesh.

  Args:
    sizes: of every axis, in the order of `AXES`.
    slices: number of slices; 0 counts those that the devices report.
    across: the axis that spans slices.
  Returns:
    Array of devices with an axis for each of `AXES`.
  Raises:
    UserError: the slices do not divide that axis, or differ in size.
  """
  groups = _slices(devices, slices)
  if across != MeshConfig.across and len(groups) == 1:
    raise UserError(f"mesh.across={across} changes nothing: all devices are in one slice")
  if sizes[across] % len(groups):
    raise UserError(f"mesh.{across} {sizes[across]} is not a multiple of the {len(groups)} slices")
  shape = [size // len(groups) if axis == across else size for axis, size in sizes.items()]
  return np.concatenate([_slice_grid(group, shape) for group in groups], axis=AXES.index(across))


def _slices(devices, count: int) -> list[list]:
  """Groups devices by the slice they report, else into consecutive groups of equal size."""
  number = lambda device: getattr(device, "slice_index", None) or 0  # noqa: E731
  groups = [list(group) for _, group in itertools.groupby(sorted(devices, key=number), number)]
  if count and len(groups) not in (1, count):
    raise UserError(f"mesh.slices {count}, but the devices are in {len(groups)} slices")
  if len(groups) == 1 and count:
    size = max(1, len(devices) // count)
    groups = [devices[i : i + size] for i in range(0, len(devices), size)]
  if len({len(group) for group in groups}) > 1 or count not in (0, len(groups)):
    raise UserError(f"{len(devices)} devices are not {count or len(groups)} slices of equal size")
  return groups


def _slice_grid(devices, shape) -> np.ndarray:
  """Arranges one slice; on TPU jax puts mesh neighbours on neighbouring chips."""
  if devices[0].platform == "tpu" and len(devices) > 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return np.array(devices, object).reshape(shape)
