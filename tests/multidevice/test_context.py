"""Attention of rows cut along `context` equals attention of whole rows, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmjax.core.errors import UserError
from llmjax.nn.attention import ring
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.context import attend_sharded
from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import MaskSpec, self_mask
from llmjax.nn.attention.scores import Bias, Scores
from llmjax.parallel.mesh import MeshConfig, make_mesh

B, T, N, K, H = 2, 48, 4, 2, 8


@dataclasses.dataclass(frozen=True)
class Case:
  rule: MaskSpec = MaskSpec()
  segments: bool = True
  prefix: bool = False
  softcap: float = 0.0
  sinks: bool = False
  bias: str = ""
  t: int = T
  value: int = H


CASES = {
  "causal": Case(segments=False),
  "packed": Case(),
  "window": Case(MaskSpec(window=7)),
  "bidirectional": Case(MaskSpec(causal=False)),
  "two-sided window": Case(MaskSpec(causal=False, window=5)),
  "sparse": Case(MaskSpec(sparse_block=4, sparse_local=2, sparse_global=1, sparse_stride=3)),
  "prefix": Case(prefix=True),
  "sinks and cap": Case(softcap=3.0, sinks=True),
  "alibi": Case(bias="alibi"),
  "table": Case(MaskSpec(causal=False), bias="table", sinks=True),
  "odd shards": Case(t=20),
  "narrow values": Case(value=5),
}


def _inputs(case):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  q, k = (draw(B, case.t, n, H) for n in (N, K))
  v, cot = (draw(B, case.t, n, case.value) for n in (K, N))
  extra = {}
  if case.sinks:
    extra["sinks_n"] = draw(N)
  if case.bias == "table":
    extra["table"] = draw(8, N)
  segments = np.ones((B, case.t), np.int32)
  if case.segments:
    segments[0, case.t // 3 :], segments[1, case.t // 2 + 1 :] = 2, 2
    segments[:, -3:] = 0
  starts = np.r_[np.ones((B, 1), bool).T, np.diff(segments, axis=1).T != 0].T
  place = np.arange(case.t)
  positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
  prefix = positions < 4 if case.prefix else None
  return (q, k, v, extra), cot, positions.astype(np.int32), segments, prefix


def _loss(case, run):
  _, cot, positions, segments, prefix = _inputs(case)

  def loss(q, k, v, extra):
    mask = self_mask(case.rule, segments if case.segments else None, positions, prefix)
    bias = None
    if case.bias == "alibi":
      bias = Bias(slopes_n=jnp.array([0.5, 0.25, 0.1, 0.02]))
    elif case.bias:
      bias = Bias(None, extra["table"], 16, both_ways=not case.rule.causal)
    o = run(q, k, v, mask, Scores(H**-0.5, case.softcap, bias, extra.get("sinks_n")))
    real = segments[..., None, None] > 0
    return jnp.sum(jnp.where(real, o * cot, 0))

  return loss


def _compare(case, context, sizes):
  arguments = _inputs(case)[0]
  whole = lambda q, k, v, mask, scores: attend(q, k, v, mask, scores, "direct")  # noqa: E731
  want = jax.jit(jax.value_and_grad(_loss(case, whole), argnums=(0, 1, 2, 3)))(*arguments)
  cut = lambda q, k, v, mask, scores: attend_sharded(  # noqa: E731
    q, k, v, mask, scores, AttentionConfig(block=16, context_parallel=context)
  )
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])])
  with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(_loss(case, cut), argnums=(0, 1, 2, 3)))(*arguments)
  # fp32 softmax over up to 48 keys in another order; gradients are sums over as many positions.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), got, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ring_equals_whole_rows(case, quick_compile):
  _compare(case, "ring", {"context": 4, "tensor": 2})


@pytest.mark.parametrize("name", ["packed", "window", "prefix", "table", "narrow values"])
@pytest.mark.parametrize("context", ["gather", "all_to_all"])
def test_the_other_ways_equal_whole_rows(context, name, quick_compile):
  _compare(CASES[name], context, {"context": 2, "tensor": 2})


@pytest.mark.parametrize("ways", [2, 3, 4, 8])
def test_a_causal_ring_gives_every_device_the_same_work_in_every_step(ways):
  mesh = make_mesh(MeshConfig(data=1, context=ways), jax.devices()[:ways])

  def count():
    order = ring._ChunkOrder(MaskSpec(), 6, prefix=False)
    own = order.ids(order.index)
    steps = []
    for step in range(ways):
      ids = order.ids((order.index - step) % ways)
      steps.append(sum(order.needed(a, b).astype(int) for a in own for b in ids))
    return jnp.stack(steps)[None]

  run = jax.shard_map(
    count, mesh=mesh, in_specs=(), out_specs=P("context"), axis_names={"context"}, check_vma=False
  )
  work = np.asarray(jax.jit(run)())
  assert work.shape == (ways, ways)
  np.testing.assert_array_equal(work, np.broadcast_to([3] + [2] * (ways - 1), work.shape))


@pytest.mark.parametrize("ways", [2, 3, 5, 8])
def test_chunks_go_where_they_are_numbered_and_come_back(ways):
  mesh = make_mesh(MeshConfig(data=1, context=ways), jax.devices()[:ways])
  row = np.arange(4 * ways).reshape(1, -1)

  def there_and_back(x):
    order = ring._ChunkOrder(MaskSpec(), 4, prefix=False)
    taken = order.balance(x)
    numbers = jnp.stack([jnp.int32(i) for i in order.ids(order.index)])
    return taken, order.unbalance(taken), numbers

  taken, back, numbers = jax.jit(
    jax.shard_map(
      there_and_back, mesh=mesh, in_specs=P(None, "context"),
      out_specs=(P(None, "context"), P(None, "context"), P("context")),
      axis_names={"context"}, check_vma=False,
    )
  )(row)
  np.testing.assert_array_equal(back, row)
  np.testing.assert_array_equal(np.asarray(taken)[0, ::2] // 2, numbers)


def test_too_few_heads_for_all_to_all_is_one_sentence():
  with pytest.raises(UserError, match=r"4 query heads do not divide over tensor × context = 8"):
    _compare(CASES["packed"], "all_to_all", {"context": 8})
