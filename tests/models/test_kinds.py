"""`model.weights`: what it may say, and that every user of `abstract(config)` sees its leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.core.config import freeze
from llmjax.core.errors import UserError
from llmjax.core.weight import fixed_paths
from llmjax.data.batch import Batch
from llmjax.models.build import abstract, build
from llmjax.models.config import ModelConfig
from llmjax.models.kinds import merged

QLORA = (
  ("*/attention/*", {"kind": "lora", "rank": 3, "base": {"kind": "nf4", "block": 8}}),
  ("*/mlp/*", {"kind": "int8"}),
)


def with_kinds(config: ModelConfig, *rows) -> ModelConfig:
  return dataclasses.replace(config, weights=rows)


def test_the_abstract_tree_is_that_of_the_model(tiny_config):
  """Shapes, dtypes and paths; what is frozen by its kind; a config that survives a file."""
  config = with_kinds(tiny_config, *QLORA)
  made = jax.jit(lambda: build(jax.random.key(0), config))()
  shapes = abstract(config)
  assert jax.tree.structure(made) == jax.tree.structure(shapes)
  leaves = tree.flatten(shapes)
  assert {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(made).items()} == {
    path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()
  }
  query = "decoder/blocks/attention/query_dnh"
  assert leaves[f"{query}/a_da"].shape == (2, 32, 3)
  assert leaves[f"{query}/b_anh"].shape == (2, 3, 4, 8)
  assert leaves[f"{query}/base_dnh/codes_dnh"].shape == (2, 16, 4, 8)
  assert leaves["decoder/blocks/mlp/up_df/scale_f"].shape == (2, 64)
  fixed = fixed_paths(shapes)
  assert fixed == {path for path in leaves if "base_" in path or "/mlp/" in path}
  assert freeze(dataclasses.asdict(config), ModelConfig) == config and hash(config) is not None


@pytest.mark.usefixtures("quick_compile")
def test_merged_weights_give_the_same_logits(tiny_config, tiny_decoder):
  """And codes of 8 bits those of the plain model, nearly: weights are off by at most 1/255."""
  tokens = np.random.default_rng(0).integers(0, 96, (2, 8))
  logits = jax.jit(lambda model: model.logits(model.hidden(Batch(tokens))[0]))
  config = with_kinds(tiny_config, *QLORA, ("embed/*", {"kind": "int8"}))
  model = jax.jit(lambda: build(jax.random.key(0), config))()
  leaves = tree.flatten(model)
  rng = np.random.default_rng(1)
  model = tree.unflatten(model, {
    path: jnp.asarray(rng.normal(size=leaf.shape) / 8, jnp.float32) if "/b_a" in path else leaf
    for path, leaf in leaves.items()
  })
  plain = jax.jit(merged)(model)
  assert tree.flatten(plain).keys() == tree.flatten(tiny_decoder).keys()
  # Sums of 32 and 64 products in another order.
  assert_allclose(logits(model), logits(plain), atol=2e-5)
  rounded = jax.jit(lambda: build(
    jax.random.key(0), with_kinds(tiny_config, ("*", {"kind": "int8"}))
  ))()
  off = np.abs(np.asarray(logits(rounded)) - np.asarray(logits(tiny_decoder))).max()
  assert 0 < off < 0.1 * np.abs(np.asarray(logits(tiny_decoder))).max()


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ((("*/up_fd", {"kind": "lora"}),), "'\\*/up_fd' matches no matrices; known: decoder/blocks"),
    ((("*/scale_d", {"kind": "int8"}),), "matches no matrices"),
    ((("*", {"kind": "int3"}),), "kind 'int3' is unknown"),
    ((("*", {"kind": "lora", "rnk": 3}),), "option 'rnk' is unknown; did you mean 'rank'"),
    ((("*", {"kind": "lora", "rank": 0}),), "rank 0 is not a positive integer"),
    ((("*", {"kind": "lora", "base": {"kind": "lora"}}),), "is not a LoRA again"),
    ((("*", {"kind": "masked", "keep": 2}),), r"keep 2 is not in \(0, 1\]"),
    (("*",), r"holds '\*', not \(pattern"),
    ((("*", "lora"),), "'lora' is not {\"kind\""),
    (
      (("*", {"kind": "int8"}), ("*/mlp/*", {"kind": "lora"})),
      r"'\*/mlp/\*' matches only matrices that earlier rows match, such as 'decoder/blocks/mlp",
    ),
  ],
)
def test_a_row_that_cannot_be_is_one_sentence(tiny_config, rows, said):
  with pytest.raises(UserError, match=said):
    abstract(with_kinds(tiny_config, *rows))


def test_int8_activations_are_refused_where_weights_are_decoded_first(tiny_config):
  """Not ignored: experts' grouped products and those with latents know float rows alone."""
  moe = dataclasses.replace(tiny_config.moe, experts=2, top_k=1, width=16, renormalize=False)
  config = dataclasses.replace(tiny_config, moe=moe)
  rows = (("*_edf", {"kind": "int8", "activations": "int8"}),)
  with pytest.raises(UserError, match=r"'int8' would change nothing for '.*_edf'"):
    abstract(with_kinds(config, *rows))
