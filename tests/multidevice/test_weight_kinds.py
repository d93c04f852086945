"""LoRA, int8 and QLoRA leaves on every mesh axis: losses, gradients and steps of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llmjax.models import kinds
from llmjax.training import check
from tests.multidevice.test_step import named, prove

LORA = "model.weights=(('*',{'kind':'lora','rank':3,'alpha':6.0}),)"  # no mesh divides a rank of 3
INT8 = "model.weights=(('*/blocks/*',{'kind':'int8'}),)"
QLORA = (
  "model.weights=(('*/blocks/*',{'kind':'lora','rank':3,'base':{'kind':'nf4'}}),"
  "('embed/*',{'kind':'lora','rank':2,'base':{'kind':'int4'}}))"
)
MIXED = INT8.replace("/blocks/", "/mlp/").removesuffix(")") + QLORA.removeprefix("model.weights=(")
TIED = "model.tie_embeddings=True"
EXPERTS = (
  "model.layers=3", "model.heads=8", "model.attention.pattern=('full',)", "model.remat=none",
  "model.attention.window=0", "model.moe.experts=8", "loss.moe_aux=0.05", "model.scan=False",
)


@pytest.fixture(autouse=True)
def adapters_that_do_something(monkeypatch):
  """b is zero at first, and so is then the gradient of a: here both are not."""
  right = kinds._lora

  def lora(base, leaf, letters, rank, alpha, key):
    made = right(base, leaf, letters, rank, alpha, key)
    b = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), made.b.shape, jnp.float32)
    return dataclasses.replace(made, b=b)

  monkeypatch.setattr(kinds, "_lora", lora)
  check._init.cache_clear()
  yield
  check._init.cache_clear()


@pytest.mark.parametrize(
  ("sizes", "changes"),
  [
    ({"fsdp": 2, "tensor": 2, "context": 2}, (LORA, TIED)),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, (MIXED,)),
    ({"expert": 2, "fsdp": 2, "tensor": 2}, (*EXPERTS, QLORA)),
    pytest.param({"fsdp": 4, "stage": 2}, (INT8,), marks=pytest.mark.slow),
    pytest.param({"stage": 2, "fsdp": 2, "tensor": 2}, (QLORA,), marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, (LORA, TIED), marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tensor": 2, "context": 2}, (QLORA, TIED), marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tensor": 4}, (INT8,), marks=pytest.mark.slow),
    pytest.param({"expert": 4, "stage": 2}, (*EXPERTS, LORA), marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 4}, (QLORA,), marks=pytest.mark.slow),
  ],
  ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_adapted_models_equal_one_device(sizes, changes):
  seen = prove(sizes, *changes)
  assert not any("codes" in path for path in seen.weights), "codes are frozen"
