"""Proves that direct and blockwise attention equal loops over heads and queries.

The platforms' own kernels are in test_platform_kernels.py, the choice in test_kernel_choice.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core.errors import UserError
from llmjax.nn.attention import kernels
from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import MaskSpec, cache_mask, cross_mask, self_mask
from llmjax.nn.attention.scores import Bias, Scores
from tests.reference import layers
from tests.reference.gradient import assert_pulled
from tests.reference.masks import keys_of
from tests.reference.positions import relative_bucket

# Softmax weights and outputs of order 1; scores below 16 in magnitude are off by 16 · 2^-24
# each, and so, relatively, are the weights; sums of at most 21 terms more than double that.
FP32 = dict(rtol=1e-5, atol=5e-6)
# It is the library that is tested, not XLA's optimizer, which takes as long again.
FAST = {"xla_backend_optimization_level": 0}
T = 21  # with blocks of 2: a loop of ten strips, and one of a single query
SEGMENTS = np.array([[1] * 8 + [2] * 11 + [0] * 2, [1] * T])
POSITIONS = np.array([[*range(8), *range(11), 0, 1], [*range(T)]])
PREFIX = (POSITIONS < 4) & (SEGMENTS > 0)


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture
def one_group(monkeypatch):
  """Groups of strips are for speed; one compiles faster than eight, which long rows have below."""
  monkeypatch.setattr(kernels, "_GROUPS", 1)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is asked of attention, in terms of both sides."""

  rule: MaskSpec
  heads: tuple = (4, 2)
  segments: bool = True
  prefix: bool = False
  softcap: float = 0.0
  scale: float = 0.5
  sinks: bool = False
  bias: str = ""  # alibi, relative


CAUSAL, BOTH_WAYS = MaskSpec(causal=True), MaskSpec(causal=False)
SPARSE = dict(sparse_block=3, sparse_local=2, sparse_global=1, sparse_stride=4)
DIRECT = {
  "grouped": Case(CAUSAL),
  "one each": Case(CAUSAL, (3, 3)),
  "one for all": Case(CAUSAL, (4, 1)),
  "both ways": Case(BOTH_WAYS, scale=0.3),
  "window both ways": Case(MaskSpec(causal=False, window=4)),
  "prefix": Case(CAUSAL, prefix=True),
  "soft cap": Case(CAUSAL, softcap=1.5),
  "sinks": Case(CAUSAL, sinks=True),
  "alibi": Case(CAUSAL, bias="alibi"),
  "relative both ways": Case(BOTH_WAYS, bias="relative"),
}
BOTH = {
  "causal": Case(CAUSAL, segments=False),
  "window, sinks": Case(MaskSpec(causal=True, window=5), sinks=True),
  "sparse, alibi": Case(MaskSpec(causal=True, **SPARSE), bias="alibi"),
  "window, prefix, soft cap": Case(MaskSpec(causal=True, window=3), prefix=True, softcap=2.0),
  "all at once": Case(
    MaskSpec(causal=False, **SPARSE), (4, 1), softcap=2.0, sinks=True, bias="relative"
  ),
}


def library_mask(case):
  return self_mask(
    case.rule,
    jnp.asarray(SEGMENTS) if case.segments else None,
    jnp.asarray(POSITIONS if case.segments else POSITIONS[[1, 1]]),
    jnp.asarray(PREFIX) if case.prefix else None,
  )


def inputs_of(case):
  """Arrays by name: what the gradient is taken with respect to, and what flows back."""
  n, k = case.heads
  inputs = {"q": random(2, T, n, 4), "k": random(2, T, k, 4, seed=1)}
  inputs["v"] = random(2, T, k, 4, seed=2)
  if case.sinks:
    inputs["sinks"] = random(n, seed=3)
  if case.bias == "relative":
    inputs["table"] = random(8, n, seed=4)
  return inputs, random(2, T, n, 4, seed=5)


def scores_of(case, inputs):
  bias = None
  if case.bias == "alibi":
    bias = Bias(2.0 ** -jnp.arange(1, case.heads[0] + 1))
  if case.bias == "relative":
    bias = Bias(None, inputs["table"], 12, both_ways=not case.rule.causal)
  return Scores(case.scale, case.softcap, bias, inputs.get("sinks"))


@functools.lru_cache
def compiled(case, block):
  """The library's result and gradients of a case; `block` None is direct."""
  kernel = "direct" if block is None else "blockwise"

  @functools.partial(jax.jit, compiler_options=FAST)
  def both(mask, inputs, grad):
    def fast(x):
      return attend(x["q"], x["k"], x["v"], mask, scores_of(case, x), kernel, block)

    out, pull = jax.vjp(fast, inputs)
    return out, *pull(grad)

  return both


def run(case, mask, inputs, grad, block):
  return compiled(case, block)(mask, inputs, grad)


def slow(case, q_positions, k_positions, keys):
  """The reference as a function of a dict of arrays."""
  n = case.heads[0]
  distance = k_positions[:, None, :] - q_positions[:, :, None]
  if case.bias == "relative":
    both_ways = not case.rule.causal
    bucket = {d: relative_bucket(int(d), 8, 12, both_ways) for d in np.unique(distance)}
    buckets = np.vectorize(bucket.get)(distance)

  def function(x):
    bias = None
    if case.bias == "alibi":
      bias = np.stack([-(2.0 ** -(head + 1)) * abs(distance) for head in range(n)], 1)
    if case.bias == "relative":
      bias = np.moveaxis(x["table"][buckets], -1, 1)
    return layers.attention(
      x["q"], x["k"], x["v"], keys, scale=case.scale, softcap=case.softcap,
      bias_bnts=bias, sinks_n=x.get("sinks"),
    )

  return function


def reference_of(case):
  segments = SEGMENTS if case.segments else None
  positions = POSITIONS if case.segments else POSITIONS[[1, 1]]
  prefix = PREFIX if case.prefix else None
  keys = keys_of(positions, positions, dataclasses.asdict(case.rule), segments, segments, prefix)
  return slow(case, positions, positions, keys)


def check(case, block):
  inputs, grad = inputs_of(case)
  # Nothing of padding is promised, so nothing flows back from it.
  text = (SEGMENTS > 0)[..., None, None] if case.segments else np.ones((2, T, 1, 1), bool)
  grad = grad * text
  mine, grads = run(case, library_mask(case), inputs, grad, block)
  function = reference_of(case)
  wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
  assert_allclose(mine * text, function(wide) * text, **FP32)
  assert_pulled(grads, function, inputs, grad, **FP32)


@pytest.mark.parametrize("case", [*DIRECT.values(), *BOTH.values()], ids=[*DIRECT, *BOTH])
def test_direct_attention_and_its_gradient_equal_the_reference(case):
  check(case, None)


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
def test_blockwise_attention_and_its_gradient_equal_the_reference(case, one_group):
  check(case, 2)


LONG = {
  "causal, window, sinks": (Case(MaskSpec(causal=True, window=40), sinks=True), 16),
  "both ways, sparse, soft cap, relative": (
    Case(
      MaskSpec(causal=False, sparse_block=16, sparse_local=1, sparse_global=1, sparse_stride=3),
      softcap=2.0,
      bias="relative",
    ),
    32,
  ),
}


@pytest.mark.parametrize(("case", "block"), LONG.values(), ids=LONG)
def test_blockwise_is_direct_on_long_packed_rows(case, block):
  t = 300  # 19 strips of 16, the last of 12; or 10 of 32
  lengths = [130, 3, 167]
  segments = np.repeat([1, 2, 3], lengths)[None]
  positions = np.concatenate([np.arange(length) for length in lengths])[None]
  mask = self_mask(case.rule, jnp.asarray(segments), jnp.asarray(positions))
  inputs, _ = inputs_of(case)
  inputs |= {name: random(1, t, 2, 4, seed=ord(name)) for name in "kv"}
  inputs["q"] = random(1, t, 4, 4, seed=9)
  grad = random(1, t, 4, 4, seed=10)
  one, one_grads = run(case, mask, inputs, grad, block)
  other, other_grads = run(case, mask, inputs, grad, None)
  # Both are fp32, with sums over 300 keys cut in other places.
  assert_allclose(one, other, rtol=1e-5, atol=2e-6)
  for name, found in one_grads.items():
    # Gradients of the table and the sinks are sums over all queries: relative to their largest.
    largest = np.abs(other_grads[name]).max()
    assert_allclose(found, other_grads[name], rtol=0, atol=1e-5 * max(1, largest), err_msg=name)
  keys = keys_of(positions, positions, dataclasses.asdict(case.rule), segments, segments)
  wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
  assert_allclose(one, slow(case, positions, positions, keys)(wide), **FP32)


@pytest.mark.parametrize(("kind", "block"), [("cache", None), ("cache", 2), ("cross", 2)])
def test_queries_and_keys_may_differ_in_number(kind, block, one_group):
  t, s = 5, 9
  case = Case(MaskSpec(causal=kind == "cache"), bias="relative", sinks=True)
  q_positions = np.array([[2, 3, 4, 5, 6], [0, 1, 2, 3, 4]])
  k_positions = np.tile(np.arange(s), (2, 1))
  if kind == "cache":
    mask = cache_mask(case.rule, jnp.asarray(q_positions), jnp.asarray(k_positions))
    keys = keys_of(q_positions, k_positions, dataclasses.asdict(case.rule))
  else:
    numbers = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    source = np.array([[1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 9])
    mask = cross_mask(jnp.asarray(numbers), jnp.asarray(q_positions), jnp.asarray(source))
    keys = keys_of(q_positions, k_positions, dataclasses.asdict(case.rule), numbers, source)
  inputs, _ = inputs_of(case)
  inputs |= {"q": random(2, t, 4, 4), "k": random(2, s, 2, 4, seed=1)}
  inputs |= {"v": random(2, s, 2, 4, seed=2)}
  grad = random(2, t, 4, 4, seed=3)
  mine, grads = run(case, mask, inputs, grad, block)
  function = slow(case, q_positions, k_positions, keys)
  wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
  assert_allclose(mine, function(wide), **FP32)
  assert_pulled(grads, function, inputs, grad, **FP32)


@pytest.mark.parametrize("block", [None, 2], ids=["direct", "blockwise"])
def test_keys_outside_the_mask_have_no_part_at_all(block, one_group):
  case = BOTH["all at once"]
  inputs, grad = inputs_of(case)
  mask = library_mask(case)
  # Row 0: document 1 is places 0-7; what document 2 holds must not matter, bit for bit.
  other = inputs | {"k": inputs["k"].at[0, 8:].set(1e4), "v": inputs["v"].at[0, 8:].set(-1e4)}
  grad = grad.at[0, 8:].set(0)
  (one, grads), (two, other_grads) = (run(case, mask, x, grad, block) for x in (inputs, other))
  assert_array_equal(one[0, :8], two[0, :8])
  assert_array_equal(one[1], two[1])
  for name in "qkv":
    assert_array_equal(grads[name][0, :8], other_grads[name][0, :8])
    assert not np.asarray(grads[name])[0, 8:].any()


@pytest.mark.parametrize("block", [None, 2], ids=["direct", "blockwise"])
def test_the_future_has_no_part_in_causal_attention(block, one_group):
  case = BOTH["causal"]
  inputs, grad = inputs_of(case)
  mask = library_mask(case)
  other = {name: x.at[:, 13:].set(50.0) for name, x in inputs.items()}
  one, two = (run(case, mask, x, grad, block)[0] for x in (inputs, other))
  assert_array_equal(one[:, :13], two[:, :13])


@pytest.mark.parametrize("block", [None, 2], ids=["direct", "blockwise"])
def test_softmax_is_taken_in_fp32_for_bf16_operands(block, one_group):
  case = Case(CAUSAL)
  inputs, grad = inputs_of(case)
  inputs = {n: (x * (1 if n == "v" else 4)).astype(jnp.bfloat16) for n, x in inputs.items()}
  mine, grads = run(case, library_mask(case), inputs, grad.astype(jnp.bfloat16), block)
  assert {x.dtype for x in (mine, *grads.values())} == {jnp.dtype(jnp.bfloat16)}
  exact = reference_of(case)({name: np.asarray(x, np.float64) for name, x in inputs.items()})
  # The scale is a power of two and scores are exact to fp32. Weights are rounded to bf16 (2^-9 of
  # each; they sum to 1, |v| < 4) and so is the result. bf16 scores of 30 would be off by 0.1.
  text = SEGMENTS > 0
  assert_allclose(np.asarray(mine, np.float32)[text], exact[text], rtol=2**-8, atol=4 * 2**-9)


def test_a_sink_takes_weight_and_gives_nothing():
  case, bare = DIRECT["sinks"], DIRECT["grouped"]
  inputs, grad = inputs_of(case)
  mask = library_mask(case)

  def with_sinks(*sinks):
    return run(case, mask, inputs | {"sinks": jnp.array(sinks, jnp.float32)}, grad, None)[0]

  plain = run(bare, mask, inputs_of(bare)[0], grad, None)[0]
  assert_allclose(with_sinks(-1e4, -1e4, -1e4, -1e4), plain, **FP32)
  first = with_sinks(1e4, -1e4, -1e4, -1e4)
  assert not first[:, :, 0].any() and np.isfinite(first).all()
  assert_allclose(first[:, :, 1:], plain[:, :, 1:], **FP32)


def test_attend_runs_what_was_chosen(monkeypatch):
  # On CPU a kernel of another platform is refused before anything is computed.
  inputs, _ = inputs_of(DIRECT["grouped"])
  given = (inputs["q"], inputs["k"], inputs["v"], library_mask(DIRECT["grouped"]), Scores(0.5))
  with pytest.raises(UserError, match="kernel=splash runs on TPU only"):
    attend(*given, "splash")
  for name, made in (("splash", 1.0), ("cudnn", 2.0)):
    monkeypatch.setattr(kernels, "choose", lambda *_, name=name: name)
    monkeypatch.setattr(kernels.platform_kernels, name, lambda *_, made=made: jnp.float32(made))
    assert attend(*given) == made
