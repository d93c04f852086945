"""Collectives of several CPU devices have a channel each, and a thread to wait in."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.parallel.channels import reserve_threads
from llmjax.parallel.mesh import MeshConfig, make_mesh


def test_every_collective_written_by_hand_has_a_channel_of_its_own():
  """XLA pairs collectives of one run by channel and devices alone."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))

  def body(x):
    whole = jax.lax.all_gather(jax.lax.all_gather(x, "fsdp"), "fsdp")
    turned = jax.lax.ppermute(jax.lax.psum(x, "data"), "data", [(0, 1), (1, 0)])
    return whole.sum() + turned + jax.lax.pmax(x, "data")

  run = jax.shard_map(
    body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  text = jax.jit(run).lower(jnp.ones(8)).as_text()
  handles = re.findall(r"channel_handle<handle = (\d+)", text)
  assert len(handles) == 5 and len(set(handles)) == 5
  again = jax.jit(run).lower(jnp.ones(8)).as_text()
  assert again == text  # or the compilation cache would never find it


@pytest.mark.parametrize(
  ("flags", "given", "threads"),
  [
    ("--xla_force_host_platform_device_count=8", None, "64"),
    ("--xla_force_host_platform_device_count=8", "16", "16"),
    ("--xla_force_host_platform_device_count=1", None, None),
    ("", None, None),
  ],
)
def test_threads_are_reserved_for_forced_devices(flags, given, threads, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.delenv("PJRT_NPROC", raising=False)
  if given:
    monkeypatch.setenv("PJRT_NPROC", given)
  reserve_threads()
  assert os.environ.get("PJRT_NPROC") == threads
  monkeypatch.delenv("PJRT_NPROC", raising=False)
