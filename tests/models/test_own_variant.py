"""Proves that a variant of attention or a kind of feed-forward layer is one class and one field.

Both are made here, outside of the library: multi-query attention whose result a gate multiplies,
which caches no values, and a feed-forward layer that takes the larger of two projections.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llmjax.core import tree
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract, build
from llmjax.models.config import ModelConfig
from llmjax.models.depth import unstack_layers
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.context import attend_sharded
from llmjax.nn.attention.latent import LatentConfig
from llmjax.nn.attention.scores import Scores
from llmjax.nn.attention.variant import AttentionVariant
from llmjax.nn.cache.dense import KVCache
from llmjax.nn.param import fan_in, param
from llmjax.nn.projection import project_out
from llmjax.nn.variant import FeedForward
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from tests.models.variants import make_config


@dataclasses.dataclass(frozen=True)
class GatedConfig(AttentionVariant):
  """Multi-query attention in which keys are the values too; `gate` multiplies the result."""

  gate: float = 0.0

  @property
  def used(self):
    return self.gate > 0

  def layer(self, key, dims, config, norm, layout, out_scale):
    return Gated(key, dims, config)

  def cache_shapes(self, dims, batch, slots):
    return (batch, 1, slots, dims["h"]), None


class Gated(nnx.Module):
  def __init__(self, key, dims, config):
    self.config = config
    param(self, key, "query_dnh", dims, fan_in(dims, "d"))
    param(self, key, "key_dh", dims, fan_in(dims, "d"))
    param(self, key, "out_nhd", dims, fan_in(dims, "nh"))

  def __call__(self, x_btd, inputs, positions_bt, cache=None):
    q_btnh = dot("btd,dnh->btnh", x_btd, self.query_dnh)
    new = KVCache(dot("btd,dh->bth", x_btd, self.key_dh)[:, None])
    if cache is not None:
      cache = new = cache.write(new, positions_bt)
    k_bs1h, scores = new.key_bskh, Scores(q_btnh.shape[-1] ** -0.5)
    o_btnh = attend_sharded(q_btnh, k_bs1h, k_bs1h, inputs.mask, scores, self.config)
    return self.config.gated.gate * project_out(self, o_btnh, "out_nhd"), cache


@dataclasses.dataclass(frozen=True)
class MaxoutConfig(FeedForward):
  """The larger of so many projections, and one back."""

  pieces: int = 0
  name = "maxout"

  @property
  def used(self):
    return self.pieces > 0

  def layer(self, key, model, out_scale):
    return Maxout(key, model.dims | {"i": self.pieces})


class Maxout(nnx.Module):
  def __init__(self, key, dims):
    param(self, key, "up_idf", dims, fan_in(dims, "d"))
    param(self, key, "down_fd", dims, fan_in(dims, "f"))

  def __call__(self, x_btd):
    pieces = [dot("btd,df->btf", x_btd, up_df) for up_df in self.up_idf]
    return dot("btf,fd->btd", jnp.maximum(*pieces), self.down_fd)


@dataclasses.dataclass(frozen=True)
class OwnAttention(AttentionConfig):
  gated: GatedConfig = GatedConfig()


@dataclasses.dataclass(frozen=True)
class OwnModel(ModelConfig):
  maxout: MaxoutConfig = MaxoutConfig()


def own_config(**values):
  base = make_config(layers=3, **{"position.kind": "alibi"})
  fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
  attention = OwnAttention(gated=GatedConfig(gate=0.5))
  return OwnModel(**fields | {"attention": attention, "maxout": MaxoutConfig(2)} | values)


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)


@jax.jit
def loss(model, tokens_bt):
  logits_btv = model.logits(model.hidden(Batch(tokens_bt))[0])[:, :-1]
  return optax.softmax_cross_entropy_with_integer_labels(logits_btv, tokens_bt[:, 1:]).mean()


@pytest.mark.usefixtures("quick_compile")
def test_own_kinds_train_and_decode():
  config = own_config()
  model = jax.jit(lambda: build(jax.random.key(0), config))()
  paths = set(tree.flatten(model))
  assert {"decoder/blocks/attention/key_dh", "decoder/blocks/maxout/up_idf"} <= paths
  assert not any("mlp/" in path or "value" in path for path in paths)
  before, grads = jax.jit(jax.value_and_grad(loss))(model, TOKENS)
  for path, grad in tree.flatten(grads).items():
    assert np.abs(grad).max() > 0, path
  model = jax.tree.map(lambda w, g: w - 0.1 * g, model, grads)
  assert loss(model, TOKENS) < before - 0.01
  # Greedy tokens out of the cache are those that whole rows give.
  prompt = TOKENS[0, :4].tolist()
  [made] = generate_ids(Model(config, model), [prompt], Sampling(temperature=0.0, max_tokens=5))
  row = np.array([prompt + made], np.int32)
  best = np.asarray(model.logits(model.hidden(Batch(row))[0])).argmax(-1)[0]
  assert best[3:-1].tolist() == made
  cache = jax.eval_shape(lambda m: unstack_layers(m).decoder.empty_cache(2, 16).layers, model)
  assert [leaf.shape for leaf in jax.tree.leaves(cache)] == 3 * [(2, 1, 16, config.dims["h"])]


def test_an_unused_section_changes_nothing():
  plain = own_config(attention=OwnAttention(), maxout=MaxoutConfig())
  expected = tree.flatten(abstract(make_config(layers=3, **{"position.kind": "alibi"})))
  assert {k: v.shape for k, v in tree.flatten(abstract(plain)).items()} == {
    k: v.shape for k, v in expected.items()
  }


def test_two_sections_in_use_exclude_each_other():
  latent = LatentConfig(kv_rank=4, rope_dim=2, nope_dim=2, value_dim=2)
  with pytest.raises(UserError, match="sections latent and gated exclude each other"):
    own_config(attention=OwnAttention(gated=GatedConfig(1.0), latent=latent))
