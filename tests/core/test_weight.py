"""Weight kinds against the arrays they stand for, written out in NumPy from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.dot import dot
from llmjax.core.grouped import grouped_dot
from llmjax.core.take import take_rows
from llmjax.core.tree import flatten
from llmjax.core.weight import LoRA, Masked, Quantized
from llmjax.models.kinds import _convert as kind_of

RNG = np.random.default_rng(0)
# The 16 levels of NormalFloat, Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
])
FP32 = dict(rtol=2e-5, atol=2e-5)  # sums of tens of products of order 1


def random(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def nibbles(codes, axis):
  """Codes as they were before two were packed into a byte, the even one into the low bits."""
  codes = np.asarray(codes)
  return np.stack([codes % 16, codes // 16], axis=axis + 1).reshape(
    *codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :]
  )


def test_int8_has_one_scale_per_output_channel():
  """absmax / 127.5 of each column: no weight is more than half a step from its code."""
  w = random(12, 5)
  made = kind_of(jnp.asarray(w), "df", {"kind": "int8", "activations": ""}, None, "")
  assert set(flatten(made)) == {"codes_df", "scale_f"}
  assert made.codes.dtype == jnp.int8 and made.shape == (12, 5)
  step = np.abs(w).max(0) / 127.5
  assert_allclose(made.scale, step, rtol=1e-6)
  assert np.all(np.abs(w / step - np.asarray(made.codes)) <= 0.5 + 1e-4)
  x = random(2, 3, 12)
  assert_allclose(dot("btd,df->btf", x, made), x @ (np.asarray(made.codes) * step), **FP32)


def test_nf4_takes_the_nearest_level_and_quantizes_its_scales_again():
  w = random(3, 2, 128, 4)  # heads' weights nhd have blocks of 64 along h
  made = kind_of(jnp.asarray(w), "nhd", {"kind": "nf4", "block": 64}, None, "")
  assert made.shape == w.shape and made.codes.dtype == jnp.uint8
  assert made.codes.size == w.size // 2, "two codes a byte"
  blocks = w.reshape(3, 2, 2, 64, 4)
  absmax = np.abs(blocks).max(3, keepdims=True)
  near = np.abs(blocks[..., None] / absmax[..., None] - NF4).argmin(-1)
  found = nibbles(made.codes, 2)
  # Values half way between two levels may round either way.
  assert (found == near.reshape(w.shape)).mean() > 0.999
  scale, own = absmax[:, :, :, 0], made.scale
  mean = scale.mean((1, 2), keepdims=True)  # n and h are the inputs of "nhd"
  step = np.abs(scale - mean).max((1, 2), keepdims=True) / 127.5
  again = np.asarray(own.codes) * step + mean
  assert own.codes.dtype == jnp.int8 and np.all(np.abs(again - scale) <= step * (0.5 + 1e-3))
  want = NF4[found.reshape(blocks.shape)] * again[:, :, :, None]
  assert_allclose(made.decode(jnp.float32), want.reshape(w.shape), **FP32)


def test_int4_has_a_scale_for_each_block_of_inputs():
  w = random(2, 64, 6)
  made = kind_of(jnp.asarray(w), "df", {"kind": "int4", "block": 16}, None, "")
  blocks = w.reshape(2, 4, 16, 6)
  step = np.abs(blocks).max(2, keepdims=True) / 7.5
  codes = nibbles(made.codes, 1).reshape(blocks.shape) - 8.0
  assert np.all(np.abs(blocks / step - codes) <= 0.5 + 1e-4) and codes.min() >= -8
  assert_allclose(made.decode(jnp.float32), (codes * step).reshape(w.shape), **FP32)


@pytest.mark.parametrize(
  ("eq", "letters"),
  [("btd,df->btf", "df"), ("btnh,nhd->btd", "nhd"), ("btd,dnh->btnh", "dnh"),
   ("btd,vd->btv", "vd"), ("btnh,rnh->btnr", "rnh"), ("bsr,rnh->bsnh", "rnh")],
)
def test_a_lora_is_its_base_and_the_product_of_its_factors(eq, letters):
  """Whichever dimensions are contracted, forward and backward."""
  sizes = dict(b=2, t=3, s=3, d=6, f=5, n=2, h=4, v=7, r=3, a=2)
  x_letters = eq.split(",")[0]
  x = random(*(sizes[letter] for letter in x_letters))
  like = random(*(sizes[letter] for letter in letters))
  key = jax.random.key(0)
  made = kind_of(jnp.asarray(like), letters, {"kind": "lora", "rank": 2, "alpha": 3.0,
                                              "base": None}, key, "")
  assert np.all(np.asarray(made.b) == 0), "it begins as its base"
  made = LoRA(made.base, made.a, jnp.asarray(random(*made.b.shape)), made.scale, letters)
  parts = [name.rsplit("_", 1)[1] for name in flatten(made)]
  assert parts[0] == letters

  def merged(made):
    return made.base + 1.5 * jnp.einsum(f"{parts[1]},{parts[2]}->{letters}", made.a, made.b)

  fast = lambda x, w: jnp.sum(jnp.sin(dot(eq, x, w)))  # noqa: E731
  slow = lambda x, w: jnp.sum(jnp.sin(jnp.einsum(eq, x, merged(w))))  # noqa: E731
  assert_allclose(dot(eq, x, made), jnp.einsum(eq, x, merged(made)), **FP32)
  ours, theirs = (jax.jit(jax.grad(one, (0, 1)))(x, made) for one in (fast, slow))
  for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "lora", "masked"])
def test_experts_and_tables_decode_what_products_do(kind):
  """`grouped_dot` and `take_rows` of a kind are those of the array that `decode` gives."""
  options = {
    "int8": {"activations": ""}, "int4": {"block": 4}, "nf4": {"block": 4},
    "lora": {"rank": 2, "alpha": 2.0, "base": {"kind": "int8", "activations": ""}},
    "masked": {"keep": 0.5},
  }[kind] | {"kind": kind}
  key = jax.random.key(0)

  def full(w):
    if isinstance(w, LoRA):
      return w.base.decode(jnp.float32) + w.scale * jnp.matmul(w.a, w.b)
    return w.decode(jnp.float32)

  experts = kind_of(jnp.asarray(random(3, 8, 6)), "edf", options, key, "")
  sizes = np.array([2, 0, 3], np.int32)
  x = random(5, 8)
  if kind == "lora":
    b = jnp.asarray(random(*experts.b.shape))
    experts = LoRA(experts.base, experts.a, b, experts.scale, "edf")
  want = [row @ np.asarray(full(experts))[e] for row, e in zip(x, [0, 0, 2, 2, 2], strict=True)]
  assert_allclose(grouped_dot(x, experts, sizes), want, **FP32)
  table = kind_of(jnp.asarray(random(9, 8)), "vd", options, key, "")
  if kind == "lora":
    table = LoRA(table.base, table.a, jnp.asarray(random(*table.b.shape)), table.scale, "vd")
  ids = np.array([[4, 0], [8, 4]])
  assert_allclose(take_rows("float32", table, ids), np.asarray(full(table))[ids], **FP32)


def test_nothing_is_trained_where_a_mask_is_zero():
  w = random(6, 4)
  made = kind_of(jnp.asarray(w), "df", {"kind": "masked", "keep": 0.25}, None, "")
  mask = np.asarray(made.mask)
  assert mask.sum() == 6 and np.abs(w)[mask == 1].min() > np.abs(w)[mask == 0].max()
  x = random(3, 6)
  loss = lambda base: jnp.sum(dot("td,df->tf", x, Masked(base, made.mask, "df")))  # noqa: E731
  assert_allclose(jax.grad(loss)(made.base), mask * x.sum(0)[:, None], **FP32)


def test_an_int8_product_rounds_rows_and_columns_and_no_more():
  """int8 × int8, summed in int32: each row of x by its largest value over 127."""
  w, x = random(32, 6), random(4, 32)
  made = kind_of(jnp.asarray(w), "df", {"kind": "int8", "activations": "int8"}, None, "")
  unit = np.abs(x).max(1, keepdims=True) / 127
  codes = np.round(x / unit)
  want = (codes @ np.asarray(made.codes, np.float64)) * unit * np.asarray(made.scale)
  assert_allclose(dot("td,df->tf", x, made), want, rtol=1e-5, atol=1e-5)
  # Backward, the weight is the decoded one.
  grad = jax.grad(lambda x: jnp.sum(dot("td,df->tf", x, made)))(x)
  assert_allclose(grad, np.tile(np.asarray(made.decode(jnp.float32)).sum(1), (4, 1)), **FP32)


def test_codes_get_no_gradient():
  made = kind_of(jnp.asarray(random(4, 6)), "df", {"kind": "int8", "activations": ""}, None, "")
  assert isinstance(made, Quantized)
  grad = jax.grad(lambda w, x: jnp.sum(dot("td,df->tf", x, w)), allow_int=True)(made, random(2, 4))
  assert grad.codes.dtype == jax.dtypes.float0 and not np.asarray(grad.scale).any()
