"""These tests run in their own process with 8 forced CPU devices: `make test` sees to it."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
  if jax.device_count() != 8:
    pytest.fail(
      f"{jax.device_count()} devices; run with XLA_FLAGS=--xla_force_host_platform_device_count=8"
    )
