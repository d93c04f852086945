"""The examples that textbooks print come out of the formulas."""

import math

import pytest

from llmjax.core.chips import CHIPS, topology
from llmjax.core.config import override
from llmjax.core.errors import UserError
from llmjax.models.build import count_parameters
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import cache_bytes_per_token
from llmjax.parallel.mesh import AXES
from llmjax.planning.cost import step_flops
from llmjax.planning.estimate import estimate, slow_axes
from llmjax.planning.formulas import (
  chip_hours,
  costs,
  rent_usd,
  serving,
  training_flops,
)
from llmjax.planning.trace import alike, trace_layers, trace_of
from llmjax.planning.traffic import collective_bytes
from llmjax.training.config import Config

LLAMA_7B = ModelConfig(
  layers=32, width=4096, heads=32, mlp_width=11_008, vocab_size=32_000, max_seq_len=2048,
  tie_embeddings=False, dtype="bfloat16",
)


def test_gpt_3_took_3e23_flops_and_many_hours():
  flops = training_flops(174.6e9, 300e9)
  assert flops == pytest.approx(3.14e23, rel=1e-3)
  assert chip_hours(flops, CHIPS["a100"]) == pytest.approx(279_800, rel=1e-3)
  assert chip_hours(flops, CHIPS["a100"], mfu=0.5) == pytest.approx(559_600, rel=1e-3)


def test_a_week_of_eight_a100_is_2688_dollars():
  assert rent_usd(CHIPS["a100"], 8, 7 * 24) == 2688


def test_a_bill_is_days_dollars_and_energy():
  week_s = 7 * 86_400
  made = costs(topology("a100:8"), 1e9 / week_s, run_tokens=2e9)
  assert (made["run_days"], made["run_cost_usd"]) == pytest.approx((14, 2 * 2688))
  assert made["cost_usd_per_btokens"] == pytest.approx(2688)
  assert made["kwh_per_btokens"] == made["run_kwh"] / 2 == pytest.approx(8 * 0.4 * 7 * 24)
  assert made["tokens_per_day"] == pytest.approx(1e9 / 7)
  unknown = costs(topology("tpu7x:2x2x1"), 1e9 / week_s)  # no price and no watts are published
  assert unknown["cost_usd_per_btokens"] is None and unknown["kwh_per_btokens"] is None


def test_llama_7b_has_as_many_weights_and_a_cache_of_a_gibibyte():
  assert count_parameters(LLAMA_7B) == 6_738_415_616
  assert cache_bytes_per_token(LLAMA_7B) * 2048 == 2**30
  one = serving(LLAMA_7B, topology("a100:1"), batch_size=1, prompt=2048, length=2048)
  assert one.cache_bytes == 2**30
  # Weights and cache are read once a token: (13.48 + 1.07) GB of 2,039 GB/s.
  assert one.token_s == pytest.approx((2 * 6.738e9 + 2**30) / 2039e9, rel=1e-3)


def test_a_step_of_llama_7b_is_six_flops_a_weight_and_token_and_half_of_attention():
  config = override(Config(), [
    f"--config.{change}" for change in (
      "model.layers=32", "model.width=4096", "model.heads=32", "model.mlp_width=11008",
      "model.vocab_size=32000", "model.max_seq_len=2048", "model.tie_embeddings=False",
      "model.remat=full", "data.batch_size=256", "mesh.fsdp=64", "mesh.data=1",
    )
  ])
  sizes = dict.fromkeys(AXES, 1) | {"fsdp": 64}
  flops, again = step_flops(config, sizes)
  tokens = 256 * 2048
  products = 6 * (6_738_415_616 - 32_000 * 4096 - 65 * 4096) * tokens  # but the look-up and norms
  attention = 3 * 32 * 2 * 2 * 4096 * (2048 + 1) / 2 * tokens
  assert flops == pytest.approx(products + attention, rel=1e-6)
  # Again: layers without the product that ends each. Attention: two products forward, twice, and
  # seven back, over 10 of 16 tiles of 512 × 512; less what the model's own six are.
  layers = 2 * (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096 - 32 * 4096 * 11_008) * tokens
  kernels = (2 + 2 + 7) * 2 * 4096 * 32 * 2048 * 10 / 16 * tokens
  # Queries and keys are turned by a product with a permutation of a head's 128 channels: forward,
  # forward again, and back.
  # Before the backward kernels attention's results are multiplied with their gradients.
  turned = (3 * 2 * 128 * 2 * 4096 + 2 * 4096) * 32 * tokens
  assert again == pytest.approx(layers + kernels + turned - attention, rel=1e-6)
  found = estimate(config, topology("v5e:8x8"), sizes)
  assert found.least_s == found.roofline["compute_s"] < found.step_s
  assert found.model_s / found.least_s == pytest.approx(flops / (flops + again))
  sent = {(one.kind, *one.axes): one.bytes for one in collective_bytes(config, sizes)}
  table, others = 32_000 * 4096, 63 / 64
  assert sent == {
    ("all-gather", "fsdp"): pytest.approx(  # in bf16: layers both ways, the head once
      2 * (2 * (6_738_415_616 - 2 * table) + table) * others
    ),
    ("reduce-scatter", "fsdp"): pytest.approx(4 * (6_738_415_616 - table) * others),
    ("all-to-all", "fsdp"): pytest.approx(2 * 4 * 2048 * 4096 * 2 * others),  # looked-up channels
  }
  low = {one.kind: one.bytes for one in collective_bytes(override(config, [
    "--config.train.grad_reduce_dtype=bfloat16", "--config.train.grad_accum_steps=4",
  ]), sizes)}
  # Half as much, but for each micro-batch; of the stream as many rows in all.
  assert low["reduce-scatter"] == pytest.approx(4 / 2 * sent["reduce-scatter", "fsdp"])
  assert low["all-gather"] == pytest.approx(4 * sent["all-gather", "fsdp"])
  assert low["all-to-all"] == pytest.approx(sent["all-to-all", "fsdp"])


def test_a_ring_sends_what_compiled_steps_were_seen_to_send():
  """As tests/multidevice/test_budget.py counts it in fp32.

  Of exchanged halves a device keeps an eighth, which is counted as sent: 56 for 55, 2 %.
  """
  config = override(Config(), [f"--config.{change}" for change in (
    "model.layers=4", "model.width=256", "model.dtype=float32", "model.max_seq_len=1024",
    "model.vocab_size=64",
    "data.batch_size=2", "mesh.context=8", "mesh.data=1",
  )])
  own = 2 * 128 * 256 * 4
  (ring,) = (
    one for one in collective_bytes(config, dict.fromkeys(AXES, 1) | {"context": 8})
    if one.kind == "collective-permute"
  )
  # Two keys and values of 4 bytes a channel; the positions and segments that go round with them are
  # 8 bytes a position, at most 2 % of it.
  assert ring.bytes == pytest.approx(4 * (8 * (2 + 4) + (4 + 4) * 7 / 8) * own, rel=0.02)


def test_experts_exchange_their_tokens_whatever_else_is_sharded():
  """Half or three quarters of a token's two experts are elsewhere: there and back, both directions.

  Positions that are sharded too leave that as it is, and sums over both axes are counted.
  """
  config = override(Config(), [f"--config.{change}" for change in (
    "model.layers=2", "model.width=256", "model.max_seq_len=2048", "model.vocab_size=64",
    "data.batch_size=8", "model.moe.experts=8",
  )])
  for sizes in ({"expert": 2}, {"expert": 4}, {"expert": 2, "context": 2}):
    found = collective_bytes(config, dict.fromkeys(AXES, 1) | sizes)
    devices, others = math.prod(sizes.values()), 1 - 1 / sizes["expert"]
    (rows,) = (one for one in found if one.kind == "all-to-all")
    assert rows.axes == ("expert",)
    assert rows.bytes == 2 * 4 * (8 * 2048 / devices) * 2 * 256 * 2 * others
    assert any(one.axes == ("context", "expert") for one in found) == ("context" in sizes)


def test_what_experts_cost_on_many_devices_follows_from_two():
  config = override(Config(), [f"--config.{change}" for change in (
    "model.layers=2", "model.width=64", "model.heads=2", "model.mlp_width=128",
    "model.max_seq_len=256", "model.vocab_size=64", "model.moe.experts=16", "model.moe.top_k=4",
  )])
  sizes = dict.fromkeys(AXES, 1) | {"expert": 8}
  traced = trace_layers(alike(config.model), config.optim.groups, "tpu", 1, 8)
  found = trace_of(config, sizes, "tpu")
  assert (found.flops, found.kept, found.live) == (traced.flops, traced.kept, traced.live)
  rows = ("all-to-all", "expert")
  assert found.sent[rows] == traced.sent[rows] > 0


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("v9:2x2", "unknown chip 'v9' in 'v9:2x2'; known: a100, b200, h100, .* v5p, v6e"),
    ("v5p:4x4", "v5p comes as 2x2x1, 2x2x2, .*, or multiples of 4 up to 16x20x28"),
    ("v5p:4x4x6", "no v5p is built as '4x4x6'"), ("v5p:16x24x28", "up to 16x20x28"),
    ("v5e:0x4", "v5e comes as 1x1, 2x2, .*, 16x16"), ("v5e:3x3", "no v5e is built as '3x3'"),
    ("v6e:32x32", "no v6e is built"), ("h100", "h100 comes as a number of chips, as h100:64"),
  ],
)
def test_a_topology_that_is_not_built_is_told_with_those_that_are(text, says):
  with pytest.raises(UserError, match=says):
    topology(text)


@pytest.mark.parametrize(
  ("text", "chips"),
  [
    ("v5e:1x1", 1), ("v6e:4x2", 8), ("v4:2x2x1", 4), ("v5p:4x4x2", 32), ("v5p:8x4x4", 128),
    ("v5p:16x16x24", 6144), ("tpu7x:16x24x24", 9216), ("b200:72", 72),
  ],
)
def test_slices_that_are_rented_are_known_whatever_the_order(text, chips):
  assert topology(text).chips == chips


@pytest.mark.parametrize(
  ("where", "sizes", "slow"),
  [
    ("h100:64", {"fsdp": 64}, {"fsdp"}), ("h100:64", {"fsdp": 8, "tensor": 8}, {"fsdp"}),
    ("h100:8", {"fsdp": 8}, set()),
    ("h100:32", {"data": 2, "fsdp": 4, "tensor": 4}, {"data", "fsdp"}),
    ("v5e:8x8", {"fsdp": 64}, set()),
  ],
)
def test_what_leaves_a_node_takes_the_slow_network(where, sizes, slow):
  sizes = dict.fromkeys(AXES, 1) | sizes
  assert slow_axes(Config(), topology(where), sizes) == slow
