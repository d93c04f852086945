"""A compiled step sends what its strategy should, by formula, and nothing else.

Bytes are those that a device holds of the whole (`parallel/collectives.py`). Of a gradient's
all-reduce and its slice XLA's CPU backend makes no reduce-scatter, so either counts over `fsdp`.
"""

import dataclasses
import functools

import jax
import pytest

from llmjax.core import tree
from llmjax.core.config import override
from llmjax.models.build import abstract
from llmjax.parallel.collectives import collectives, summary
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.schedules import make_schedule
from llmjax.training.check import _quick
from llmjax.training.config import Config
from llmjax.training.parameters import abstract_state
from llmjax.training.shrink import made_up_batch, shrink
from llmjax.training.step import compile_step

CONFIG = shrink(
  override(Config(), [f"--config.{change}" for change in (
    "model.layers=4", "model.heads=8", "model.kv_heads=8", "model.tie_embeddings=False",
    "loss.chunk=0",
  )]),
  8,
)
LAYERS, (ROWS, T, D) = 4, (CONFIG.data.batch_size, CONFIG.model.max_seq_len, CONFIG.model.width)
SHAPES = abstract(CONFIG.model)
size_of = lambda model: sum(4 * leaf.size for leaf in jax.tree.leaves(model))  # noqa: E731
ALL, BLOCKS = size_of(SHAPES), size_of(SHAPES.decoder.blocks)
TABLE = size_of(SHAPES.embed.token_vd)  # as large as the head
STREAM = 4 * ROWS * T * D  # the residual stream of the whole batch
SMALL = 20_000  # scalars, scales of norms, positions and segments


@functools.cache
def traffic(zero=3, accumulation=1, config=CONFIG, **sizes) -> dict:
  """Bytes a step sends, by (kind, axes)."""
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
  train = dataclasses.replace(config.train, zero_stage=zero, grad_accum_steps=accumulation)
  config = dataclasses.replace(config, train=train)
  state, step = abstract_state(config, mesh), compile_step(config, mesh)
  batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), made_up_batch(CONFIG))
  with jax.set_mesh(mesh):
    compiled = step.lower(state, batch).compile(compiler_options=_quick())
  return summary(collectives(compiled.as_text(), mesh))


def took(found: dict, *kinds) -> int:
  """Takes kinds out of what was found and adds them up."""
  return sum(found.pop(key) for key in list(found) if key[0] in kinds)


def nothing_else(found: dict):
  assert sum(found.values()) <= SMALL, found


def near(size_bytes):
  return pytest.approx(size_bytes, rel=0.01, abs=SMALL)


def test_data_adds_every_gradient_once():
  found = dict(traffic(data=8))
  assert took(found, "all-reduce") == near(ALL)
  nothing_else(found)


def test_zero_3_gathers_layers_twice_the_head_once_and_no_table():
  found = dict(traffic(fsdp=8))
  assert took(found, "all-gather") == near(2 * BLOCKS + TABLE)
  assert took(found, "all-reduce", "reduce-scatter") == near(ALL - TABLE)
  assert took(found, "all-to-all") == near(2 * STREAM // 8)  # vectors looked up, and gradients
  nothing_else(found)


def test_int8_weights_are_gathered_as_bytes():
  """A quarter of what fp32 weights send, twice a layer, and no gradient of them."""
  weights = (("*/blocks/*", {"kind": "int8"}),)
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, weights=weights))
  leaves = tree.flatten(abstract(config.model).decoder)
  codes = sum(leaf.size for path, leaf in leaves.items() if "codes" in path)
  found = dict(traffic(config=config, fsdp=8))
  assert 4 * codes == near(BLOCKS)
  assert took(found, "all-gather") == near(2 * codes + TABLE)
  assert took(found, "all-reduce", "reduce-scatter") == near(TABLE)
  assert took(found, "all-to-all") == near(2 * STREAM // 8)
  nothing_else(found)


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_1_and_2_gather_updated_weights_once(zero):
  found = dict(traffic(zero=zero, fsdp=8))
  assert took(found, "all-gather") == near(ALL)
  assert took(found, "all-reduce", "reduce-scatter") == near(ALL)
  nothing_else(found)


def test_tensor_sends_four_streams_a_layer_each_way():
  found = dict(traffic(tensor=8))
  # Beside the layers: into the head, and back into the embedding.
  assert took(found, "all-gather") == near((4 * LAYERS + 2) * STREAM)
  assert took(found, "reduce-scatter") == near((4 * LAYERS + 1) * STREAM)
  assert took(found, "all-reduce") == near(STREAM)  # the head's, back
  nothing_else(found)


def test_a_ring_passes_keys_and_values_and_their_gradients():
  found = dict(traffic(context=8))
  own = STREAM // 8  # of queries, and here of keys and of values, on one device
  passed = 8 * (2 + 4) * own  # forward k and v; back k, v and their gradients
  exchanged = (4 + 4) * own  # q, k, v in and o out; back do in and dq, dk, dv out
  assert took(found, "collective-permute") == near(LAYERS * (passed + exchanged) + 2 * SMALL)
  assert took(found, "all-reduce") == near(ALL)
  nothing_else(found)


def test_a_pipeline_sends_two_streams_a_tick():
  found = dict(traffic(stage=4, data=2, accumulation=4))
  ticks = len(make_schedule("1f1b", 4, 4).table)
  permutes = found.pop(("collective-permute", ("stage",)))
  assert permutes == near(2 * ticks * STREAM // (4 * 2))  # of a microbatch's rows on one device
  # Embedding and head are added over stages.
  assert found.pop(("all-reduce", ("stage",))) == near(ALL - BLOCKS)


def test_experts_exchange_rows_four_times_a_layer_and_their_weights_never():
  config = override(CONFIG, ["--config.model.moe.experts=8", "--config.model.moe.width=64"])
  model = abstract(config.model)
  experts = size_of([getattr(model.decoder.blocks.moe, f"{name}_e{io}") for name, io in (
    ("gate", "df"), ("up", "df"), ("down", "fd"),
  )])
  found = dict(traffic(config=config, expert=8))
  # There is room for all rows of one device on each other; two ways there, two back.
  rows = 8 * (ROWS // 8) * T
  assert took(found, "all-to-all") == near(LAYERS * 4 * rows * D * 4)
  assert took(found, "all-reduce") == near(size_of(model) - experts)
  # XLA's CPU backend gathers what it takes the largest of: every row's scores.
  assert took(found, "all-gather") == near(LAYERS * 4 * ROWS * T * 8)
  nothing_else(found)
