"""A dense model made into experts is the dense model; as much is drawn anew as was asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import build
from llmjax.models.model import Model
from llmjax.models.upcycle import InitConfig, init_from
from llmjax.nn.moe import MoeConfig

pytestmark = pytest.mark.usefixtures("quick_module")

EXPERTS = MoeConfig(experts=4, top_k=2)


@pytest.fixture(scope="module")
def fresh(tiny_config):
  config = dataclasses.replace(tiny_config, moe=EXPERTS)
  return config, jax.jit(lambda: build(jax.random.key(5), config))()


@jax.jit
def logits(model, tokens_bt):
  return model.logits(model.hidden(Batch(tokens_bt))[0])


def made(tiny_config, tiny_decoder, fresh, drop=0.0):
  config, weights = fresh
  return init_from(Model(tiny_config, tiny_decoder), config, weights, drop, seed=3)


def test_copies_are_the_dense_model(tiny_config, tiny_decoder, fresh):
  tokens_bt = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 16)), jnp.int32)
  wanted = logits(tiny_decoder, tokens_bt)
  got = logits(made(tiny_config, tiny_decoder, fresh), tokens_bt)
  # Weights of two experts sum to 1 but for rounding, once a layer.
  assert_allclose(got, wanted, atol=1e-5)
  assert not np.allclose(logits(fresh[1], tokens_bt), wanted, atol=1e-2)


def test_drop_redraws_that_share_of_each_experts_channels(tiny_config, tiny_decoder, fresh):
  new = tree.flatten(made(tiny_config, tiny_decoder, fresh, drop=0.25))
  old = tree.flatten(tiny_decoder)
  up, down = (new[f"decoder/blocks/moe/{name}"] for name in ("up_edf", "down_efd"))
  moved = np.asarray(up != old["decoder/blocks/mlp/up_df"][:, None]).any(2)
  assert (moved.sum(-1) == 0.25 * tiny_config.mlp_width).all()
  also = np.asarray(down != old["decoder/blocks/mlp/down_fd"][:, None]).any(-1)
  assert (also == moved).all()  # the same channels in all three matrices
  assert len({row.tobytes() for row in moved.reshape(-1, moved.shape[-1])}) > 1
  redrawn = np.asarray(up).swapaxes(2, 3)[moved]
  assert 0.8 < redrawn.std() / np.asarray(old["decoder/blocks/mlp/up_df"]).std() < 1.2


def test_layers_that_stay_dense_are_the_first(tiny_config, tiny_decoder):
  config = dataclasses.replace(tiny_config, moe=dataclasses.replace(EXPERTS, first_k_dense=1))
  weights = jax.jit(lambda: build(jax.random.key(5), config))()
  tokens_bt = jnp.arange(8)[None]
  got = logits(made(tiny_config, tiny_decoder, (config, weights)), tokens_bt)
  assert_allclose(got, logits(tiny_decoder, tokens_bt), atol=1e-5)


def test_mistakes_are_named(tiny_config, tiny_decoder, fresh):
  config, weights = fresh
  model = Model(tiny_config, tiny_decoder)
  wide = dataclasses.replace(config, mlp_width=128)
  wider = jax.jit(lambda: build(jax.random.key(5), wide))()
  with pytest.raises(UserError, match=r"moe/down_efd.*\(2, 4, 128, 32\) here.*\(2, 4, 64, 32\)"):
    init_from(model, wide, wider, 0.0, 0)
  shared = dataclasses.replace(config, moe=dataclasses.replace(EXPERTS, shared=1))
  with pytest.raises(UserError, match=r"set model.moe.shared to 0"):
    init_from(model, shared, weights, 0.0, 0)
  with pytest.raises(UserError, match=r"init.drop changes nothing"):
    init_from(model, tiny_config, tiny_decoder, 0.5, 0)
  with pytest.raises(UserError, match=r"init.drop=0.5 changes nothing without init.checkpoint"):
    InitConfig(drop=0.5)
