"""What a traced program will run on, which need not be what traces it."""

import glob
import importlib.util
import os

import jax

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def platform() -> str:
  """Names the platform (cpu, gpu, tpu) of the mesh in scope; without one, the default backend's.

  Machines without a TPU compile for one: the mesh then says so, the backend does not.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def spare_libtpu():
  """Has jax compute on the CPU where libtpu is installed, to compile with, and no accelerator is.

  It would try the library, which complains in six lines; `JAX_PLATFORMS` has the last word.
  """
  asked = "JAX_PLATFORMS" in os.environ or any(map(glob.glob, _ACCELERATORS))
  if not asked and importlib.util.find_spec("libtpu"):
    jax.config.update("jax_platforms", "cpu")
