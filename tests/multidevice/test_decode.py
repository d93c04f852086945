"""Decoding on a mesh writes, token for token, what one device writes, for any number of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.latent import LatentConfig
from llmjax.nn.moe import MoeConfig
from llmjax.nn.position import PositionConfig
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import weight_shardings
from llmjax.serve.generate import generate_ids
from llmjax.serve.prompt import Prompts
from llmjax.serve.sample import Sampling
from tests.multidevice.test_step import named

CONFIG = ModelConfig(
  layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, vocab_size=48, max_seq_len=32,
  dtype="float32", attention=AttentionConfig(pattern=("window", "full"), window=6),
)
PROMPTS = [[1, 5, 9, 40, 3], [7], list(range(2, 14))]
# Both are one compiled program: sampling is data.
SAMPLINGS = Sampling(temperature=0, max_tokens=9), Sampling(temperature=1.5, top_k=20, max_tokens=9)


OTHERS = {
  "shared_keys": CONFIG,  # two key heads, for four devices of tensor
  "latent": dataclasses.replace(
    CONFIG, kv_heads=0, layers=1,
    attention=AttentionConfig(latent=LatentConfig(kv_rank=8, rope_dim=4, nope_dim=4, value_dim=6)),
  ),
  "encoder_decoder": dataclasses.replace(
    CONFIG, kind="encoder_decoder", layers=1, encoder_layers=1, attention=AttentionConfig(),
    position=PositionConfig(kind="relative", buckets=8, max_distance=16),
  ),
  "experts": dataclasses.replace(
    CONFIG, layers=1, attention=AttentionConfig(), moe=MoeConfig(experts=4, top_k=2)
  ),
}


def random_model(config: ModelConfig) -> Model:
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32)  # noqa: E731
  return Model(config, jax.tree.map(draw, abstract(config)))


def on_mesh(model: Model, sizes) -> Model:
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)
  weights = jax.device_put(model.parameters, weight_shardings(mesh, model.parameters))
  return dataclasses.replace(model, parameters=weights)


@pytest.fixture(scope="module")
def model() -> Model:
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def expected(model):
  return [generate_ids(model, PROMPTS, sampling) for sampling in SAMPLINGS]


@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 2, "tensor": 2}, {"data": 2, "stage": 2, "context": 2},
    *(pytest.param({axis: 2}, marks=pytest.mark.slow) for axis in ("fsdp", "context", "tensor")),
  ],
  ids=named,
)
def test_three_rows_on_a_mesh_are_those_of_one_device(model, expected, sizes):
  sharded = on_mesh(model, sizes)
  for sampling, want in zip(SAMPLINGS, expected, strict=True):
    assert generate_ids(sharded, PROMPTS, sampling) == want
  devices = {d for leaf in jax.tree.leaves(sharded.decoding) for d in leaf.devices()}
  assert devices == set(jax.devices()[: np.prod(list(sizes.values()))])


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("experts", {"expert": 2, "context": 2}), ("shared_keys", {"data": 2, "tensor": 4}),
    pytest.param("latent", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("encoder_decoder", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_other_kinds_of_model_on_a_mesh_write_what_one_device_writes(name, sizes):
  """Log-probabilities too, since a wrong choice of experts may leave greedy tokens as they were."""
  model = random_model(OTHERS[name])
  prompts = Prompts(PROMPTS)
  if name == "encoder_decoder":
    prompts = Prompts([[0]] * 3, PROMPTS)
  greedy = Sampling(temperature=0, max_tokens=6)
  want, found = (
    generate_ids(each, prompts, greedy, logprobs=True) for each in (model, on_mesh(model, sizes))
  )
  for (ids, logprobs), (want_ids, want_logprobs) in zip(found, want, strict=True):
    assert ids == want_ids
    assert_allclose(logprobs, want_logprobs, atol=2e-5)  # fp32 sums in another order
