"""The platform that a traced program will run on, which need not be the one that traces it."""

import glob
import importlib.util

import jax

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")


def platform() -> str:
  """Returns the platform (cpu, gpu, tpu) of the mesh in scope, or of the default backend.

  They differ where a machine without a TPU compiles for one.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()


def spare_libtpu():
  """Makes jax use the CPU where libtpu is installed for compiling but there is no accelerator.

  Otherwise jax would try libtpu and print six lines of errors. `JAX_PLATFORMS` takes precedence.
  """
  asked = jax.config.jax_platforms or any(map(glob.glob, _ACCELERATORS))
  if not asked and importlib.util.find_spec("libtpu"):
    jax.config.update("jax_platforms", "cpu")
