"""What a traced program will run on, which need not be what traces it."""

import jax


def platform() -> str:
  """Names the platform (cpu, gpu, tpu) of the mesh in scope; without one, the default backend's.

  Machines without a TPU compile for one: the mesh then says so, the backend does not.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return device.platform if device else jax.default_backend()
