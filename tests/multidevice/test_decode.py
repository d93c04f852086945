"""Decoding on a mesh writes, token for token, what one device writes, for any number of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import weight_shardings
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from tests.multidevice.test_step import named

CONFIG = ModelConfig(
  layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, vocab_size=48, max_seq_len=32,
  dtype="float32", attention=AttentionConfig(pattern=("window", "full"), window=6),
)
PROMPTS = [[1, 5, 9, 40, 3], [7], list(range(2, 14))]
# Both are one compiled program: sampling is data.
SAMPLINGS = Sampling(temperature=0, max_tokens=9), Sampling(temperature=1.5, top_k=20, max_tokens=9)


@pytest.fixture(scope="module")
def model() -> Model:
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), abstract(CONFIG)
  )
  return Model(CONFIG, values)


@pytest.fixture(scope="module")
def expected(model):
  return [generate_ids(model, PROMPTS, sampling) for sampling in SAMPLINGS]


@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 2}, {"context": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2},
    {"data": 2, "stage": 2, "context": 2},
  ],
  ids=named,
)
def test_three_rows_on_a_mesh_are_those_of_one_device(model, expected, sizes):
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)
  weights = jax.device_put(model.parameters, weight_shardings(mesh, model.parameters))
  placed = dataclasses.replace(model, parameters=weights)
  for sampling, want in zip(SAMPLINGS, expected, strict=True):
    assert generate_ids(placed, PROMPTS, sampling) == want
  assert {d for leaf in jax.tree.leaves(placed.decoding) for d in leaf.devices()} == set(devices)
