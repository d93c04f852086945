"""Proves the arithmetic: weights against the trees and published sizes, FLOPs against XLA's count,
keys seen against the mask itself, cache bytes against the cache.
"""

import jax
import jax.numpy as jnp
import pytest

from llmjax.data.batch import Batch
from llmjax.models.build import abstract, build, count_parameters
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import (
  _seen,
  cache_bytes_per_token,
  filled_share,
  forward_flops_per_token,
  seen_share,
)
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from tests.models.counts import parameters
from tests.models.variants import VARIANTS, make_config, reference_config
from tests.reference.model_layers import may_look

LAYER_NORM = NormConfig(kind="layer", bias=True)
LEARNED = PositionConfig(kind="learned")
BIASED = AttentionConfig(bias="all")

# As their makers state them, or as the sum of their published weights' sizes.
PUBLISHED = {
  "Llama-3-70B": (
    ModelConfig("decoder", 80, 0, 8192, 64, 8, 128, 28_672, vocab_size=128_256,
                tie_embeddings=False),
    70_553_706_496,
  ),
  "LLaMA-7B": (
    ModelConfig("decoder", 32, 0, 4096, 32, 32, 0, 11_008, vocab_size=32_000,
                tie_embeddings=False),
    6_738_415_616,
  ),
  "GPT-2": (
    ModelConfig("decoder", 12, 0, 768, 12, 0, 0, 3072, "gelu_tanh", True, vocab_size=50_257,
                max_seq_len=1024, attention=BIASED, position=LEARNED, norm=LAYER_NORM),
    124_439_808,
  ),
  "T5-small": (
    ModelConfig("encoder_decoder", 6, 6, 512, 8, 0, 64, 2048, "relu", vocab_size=32_128,
                position=PositionConfig(kind="relative")),
    60_506_624,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  config, size = PUBLISHED[name]
  assert parameters(config) == size
  assert count_parameters(config) == size


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_counted_as_the_tree_has_them(name):
  config = VARIANTS[name]
  assert parameters(config) == count_parameters(config)
  assert count_parameters(config) == sum(a.size for a in jax.tree.leaves(abstract(config)))


# Wide enough that products with weights and keys are nearly all there is to count.
WIDE = {
  "layers": 3, "width": 128, "heads": 4, "head_dim": 64, "mlp_width": 320, "vocab_size": 512,
  "max_seq_len": 128, "scan": False,
}
FLOPS = {
  "tied": {},
  "untied": {"tie_embeddings": False},
  "plain": {"activation": "relu", "block": "parallel_shared", "position.kind": "learned"},
  "gpt2": {"activation": "gelu", "mlp_bias": True, "attention.bias": "all", "kv_heads": 0},
  "encoder": {"kind": "encoder"},
  "latent": {
    "kv_heads": 0, "attention.latent.kv_rank": 64, "attention.latent.query_rank": 48,
    "attention.latent.rope_dim": 16, "attention.latent.nope_dim": 48,
    "attention.latent.value_dim": 64,
  },
  "two_stacks": {"kind": "encoder_decoder", "encoder_layers": 2},
}


@pytest.mark.parametrize("name", FLOPS)
def test_forward_flops_are_those_xla_counts_but_for_the_masked_half(name):
  length, rows = 128, 2
  config = make_config(**WIDE, **FLOPS[name])
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  batch = {"tokens_bt": tokens}
  if config.kind == "encoder_decoder":
    batch["source_bs"] = tokens

  def run(model, batch):
    return model.logits(model.hidden(Batch(**batch))[0])

  counted = jax.jit(run).lower(abstract(config), batch).compile().cost_analysis()["flops"]
  counted /= rows * length
  if config.kind == "encoder_decoder":
    # The source's keys and values are projected in a loop, whose body XLA counts once.
    counted += (config.layers - 1) * 2 * 2 * config.width * config.kv_heads * config.head_dim
  causal = forward_flops_per_token(config, length)
  # XLA multiplies every query with every key: `length` of them, where causal rows need
  # (length + 1) / 2 on average.
  per_key = 2 * 2 * config.heads * 64 * config.layers
  full = causal + config.causal * per_key * (length - (length + 1) / 2)
  # XLA also counts softmax, norms, rotations and activations, one or a few per element: some 5 per
  # score beside the 4 · 64 of its products, 2 %, and up to 20 for each of 320 numbers of an exact
  # GELU beside the 4 · 128 of theirs, as much again; nothing else of that size.
  assert full <= counted <= 1.05 * full


PATTERNS = {
  "full": {},
  "both_ways": {"attention.mask": "bidirectional"},
  "window": {"attention.pattern": ("window",), "attention.window": 5},
  "wide_window": {"attention.pattern": ("window",), "attention.window": 99},
  "window_both_ways": {
    "attention.mask": "bidirectional", "attention.pattern": ("window",), "attention.window": 5,
  },
  "wide_window_both_ways": {
    "attention.mask": "bidirectional", "attention.pattern": ("window",), "attention.window": 99,
  },
  "sparse": {"attention.pattern": ("sparse",), "attention.sparse_block": 4},
  "strided": {
    "attention.pattern": ("sparse",), "attention.sparse_block": 3, "attention.sparse_stride": 3,
    "attention.sparse_local": 1, "attention.sparse_global": 0,
  },
  "sparse_both_ways": {
    "attention.mask": "bidirectional", "attention.pattern": ("sparse",),
    "attention.sparse_block": 4,
  },
}


@pytest.mark.parametrize("length", [1, 4, 23])
@pytest.mark.parametrize("name", PATTERNS)
def test_keys_seen_are_those_of_the_mask(name, length):
  config = make_config(**PATTERNS[name])
  layer, cfg = config.attention.pattern[0], reference_config(config)
  seen = sum(
    may_look(query, key, True, False, layer, cfg, config.causal)
    for query in range(length)
    for key in range(length)
  )
  assert _seen(config, layer, length) * length == pytest.approx(seen / length, rel=1e-12)


def test_flops_add_up_the_pattern():
  """Layers of each kind count their own keys, in turn, also where the pattern is cut short."""
  pattern = {"attention.pattern": ("window", "full"), "attention.window": 4, "layers": 3}
  mixed = forward_flops_per_token(make_config(**pattern), 20)
  full = forward_flops_per_token(make_config(layers=3), 20)
  window = make_config(**{**pattern, "attention.pattern": ("window",)})
  assert mixed == pytest.approx((full + 2 * forward_flops_per_token(window, 20)) / 3, rel=1e-12)


@pytest.mark.parametrize(("name", "size"), [("llama", 4), ("bf16", 2), ("olmo2", 4), ("mla", 4)])
def test_cache_bytes_are_those_of_the_cache(name, size):
  config = VARIANTS[name]
  cache = jax.eval_shape(lambda: abstract_cache(config, 3, 10))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  assert cache_bytes_per_token(config, size) * 3 * 10 == held


def abstract_cache(config, rows, slots):
  return build(jax.random.key(0), config).decoder.empty_cache(rows, slots).layers


def test_llama_7b_keeps_a_gibibyte_at_2048_positions():
  assert cache_bytes_per_token(PUBLISHED["LLaMA-7B"][0]) * 2048 == 2**30


@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("name", [name for name in PATTERNS if not name.startswith("s")])
def test_a_block_is_seen_if_any_of_its_pairs_is(name, block):
  """Half the layers are full, the others of the pattern."""
  asked = PATTERNS[name]
  kinds = ("full", *asked.get("attention.pattern", ("full",)))
  config = make_config(**(asked | {"attention.pattern": kinds, "layers": 2}))
  cfg, length, touched = reference_config(config), 24, 0
  for kind in kinds:
    pairs = {
      (query // block, key // block)
      for query in range(length)
      for key in range(length)
      if may_look(query, key, True, False, kind, cfg, config.causal)
    }
    touched += len(pairs)
  assert seen_share(config, length, block) == pytest.approx(touched / 2 / (length / block) ** 2)


def test_rooms_for_rows_are_filled_by_even_load():
  """Four devices with two experts each: all of 4 devices' tokens may come, each once or twice."""
  config = make_config(**{"moe.experts": 8, "moe.top_k": 2})
  assert filled_share(config, 1) == 1
  assert filled_share(config, 4) == 2 / (4 * 2)
  assert filled_share(config, 8) == 2 / (8 * 1)
