"""Fewer key heads than devices of `tensor`: each head is shared by some of them, as one device's.

Loss, every gradient and three steps; with norms of single and of all heads, biases, positions on
a ring, a pipeline, packed rows and an adapter on the shared heads.
"""

import pytest

from tests.multidevice.test_step import named, prove

ADAPTER = "model.weights=(('*/key_dkh',{'kind':'lora','rank':3}),)"
CASES = [
  ({"fsdp": 2, "tensor": 4}, ("model.heads=8", "model.kv_heads=2", "model.attention.qk_norm=head")),
  pytest.param(
    {"context": 2, "tensor": 4},
    ("model.heads=8", "model.kv_heads=2", "model.attention.qk_norm=all", ADAPTER),
    marks=pytest.mark.slow,
  ),
  pytest.param(
    {"stage": 2, "tensor": 4}, ("model.heads=4", "model.kv_heads=1", "model.attention.bias=all"),
    marks=pytest.mark.slow,
  ),
]


@pytest.mark.parametrize(("sizes", "changes"), CASES, ids=lambda value: named(value) if isinstance(
  value, dict) else "")
def test_shared_key_heads_equal_one_device(sizes, changes):
  prove(sizes, *changes)
