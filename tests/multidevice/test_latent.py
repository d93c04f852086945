"""Latent attention, with experts beside it, equals one device on meshes that cut it every way."""

import pytest

from tests.multidevice.test_step import named, prove

LATENT = (
  "model.kv_heads=0", "model.head_dim=0", "model.attention.latent.kv_rank=64",
  "model.attention.latent.query_rank=48", "model.attention.latent.rope_dim=8",
  "model.attention.latent.nope_dim=8", "model.attention.latent.value_dim=8",
  "model.moe.experts=8", "model.moe.shared=1", "model.moe.first_k_dense=1",
  "model.attention.pattern=('full',)", "model.attention.window=0",
)


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param({"fsdp": 2, "tensor": 2, "context": 2}, marks=pytest.mark.slow),
    {"fsdp": 4, "expert": 2},
  ],
  ids=named,
)
def test_latents_and_experts_equal_one_device(sizes):
  prove(sizes, *LATENT)
