"""Proves which kernel runs where, what each refuses, and how much memory the two of ours need."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llmjax.core.errors import UserError
from llmjax.nn.attention.kernels import attend, choose
from llmjax.nn.attention.mask import MaskSpec, cache_mask, self_mask
from llmjax.nn.attention.scores import Bias, Scores

# It is memory that is measured, which XLA's optimizer of code does not change.
FAST = {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize("kernel", ["blockwise", "direct"])
def test_memory_grows_with_the_row_or_with_its_square(kernel):
  def temporary(t):
    """Bytes that XLA sets aside for the gradient of one head; nothing is run."""
    positions = jax.ShapeDtypeStruct((1, t), jnp.int32)
    x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)

    def loss(q, k, v, positions):
      return attend(q, k, v, self_mask(MaskSpec(), None, positions), Scores(1.0), kernel, 128).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, positions)
    return lowered.compile(FAST).memory_analysis().temp_size_in_bytes

  ratio = temporary(8192) / temporary(2048)
  # 4 times as many positions, 16 times as many pairs; XLA keeps three or four arrays of pairs, so
  # their number may change as well.
  assert ratio > 10 if kernel == "direct" else ratio < 4.6


MASK = self_mask(MaskSpec(), None, jnp.zeros((1, 256), jnp.int32))
PACKED = self_mask(MaskSpec(), jnp.ones((1, 256), jnp.int32), jnp.zeros((1, 256), jnp.int32))
SHAPE = (1, 256, 2, 64)
PLAIN = Scores(0.125)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_takes_the_platforms_own_kernel_where_it_can(platform):
  own = {"cpu": "direct", "gpu": "cudnn", "tpu": "splash"}[platform]
  assert choose("auto", platform, SHAPE, SHAPE, MASK, PLAIN) == own
  assert choose("auto", platform, SHAPE, SHAPE, PACKED, PLAIN) == own
  slopes = Scores(0.125, bias=Bias(jnp.ones(2)), sinks_n=jnp.ones(2))
  assert choose("auto", platform, SHAPE, SHAPE, MASK, slopes) == "direct"
  long, longer = (1, 1024, 2, 60), (1, 1028, 2, 60)
  assert choose("auto", platform, long, long, MASK, slopes) == "direct"
  assert choose("auto", platform, longer, longer, MASK, slopes) == "blockwise"
  assert choose("auto", platform, (1, 1, 2, 60), (1, 4096, 2, 60), MASK, slopes) == "direct"
  for name in ("direct", "blockwise"):
    assert choose(name, platform, SHAPE, SHAPE, MASK, PLAIN) == name


def test_auto_gives_cudnn_no_mask_of_all_pairs_of_a_long_row():
  long, mask = (1, 8192, 2, 64), self_mask(MaskSpec(), None, jnp.zeros((1, 8192), jnp.int32))
  packed = dataclasses.replace(mask, q_segments_bt=jnp.ones((1, 8192), jnp.int32))
  assert choose("auto", "gpu", long, long, mask, PLAIN) == "cudnn"
  assert choose("auto", "gpu", long, long, packed, PLAIN) == "blockwise"
  assert choose("cudnn", "gpu", long, long, packed, PLAIN) == "cudnn"
  slopes = Scores(0.125, bias=Bias(jnp.ones(2)))
  assert choose("auto", "gpu", long, long, mask, slopes) == "blockwise"


CACHE = cache_mask(MaskSpec(), jnp.zeros((1, 256), jnp.int32), jnp.arange(256)[None])
PREFIXED = dataclasses.replace(MASK, prefix_bs=jnp.ones((1, 256), bool))
BLOCKS = dataclasses.replace(MASK, rule=MaskSpec(sparse_block=64))
BIASED = Scores(1.0, bias=Bias(jnp.ones(2)))
REFUSED = [
  ("splash", "cpu", dict(), "runs on TPU only, and this is cpu"),
  ("splash", "gpu", dict(), "runs on TPU only, and this is gpu"),
  ("splash", "tpu", dict(mask=CACHE), "needs self-attention without a cache"),
  ("splash", "tpu", dict(mask=PREFIXED), "without a prefix"),
  ("splash", "tpu", dict(mask=BLOCKS), "takes no block-sparse pattern"),
  ("splash", "tpu", dict(scores=BIASED), "takes no bias by distance"),
  ("splash", "tpu", dict(shape=(1, 200, 2, 64)), "positions in 128s .* not 200 and 64"),
  ("splash", "tpu", dict(shape=(1, 256, 2, 32)), "head widths in 64s, not 256 and 32"),
  ("cudnn", "cpu", dict(), "runs on NVIDIA GPUs only, and this is cpu"),
  ("cudnn", "tpu", dict(), "runs on NVIDIA GPUs only, and this is tpu"),
  ("cudnn", "gpu", dict(scores=Scores(1.0, softcap=1.0)), "neither a soft cap nor sinks"),
  ("cudnn", "gpu", dict(scores=Scores(1.0, sinks_n=jnp.ones(2))), "neither a soft cap nor sinks"),
  ("cudnn", "gpu", dict(shape=(1, 256, 2, 136)), "head widths up to 128 in 8s, not 136"),
  ("cudnn", "gpu", dict(shape=(1, 256, 2, 60)), "head widths up to 128 in 8s, not 60"),
  ("cudnn", "gpu", dict(dtype=jnp.float32), "in bfloat16 or float16, not float32"),
  ("cudnn", "gpu", dict(mask=PACKED, shape=(1, 255, 2, 64)), "even numbers .* not 255 and 255"),
  ("cudnn", "gpu", dict(scores=BIASED, shape=(1, 255, 2, 64)), "even numbers"),
]


@pytest.mark.parametrize(("kernel", "platform", "given", "reason"), REFUSED)
def test_a_kernel_that_cannot_says_why_in_one_line_and_auto_takes_another(
  kernel, platform, given, reason
):
  shape = given.get("shape", SHAPE)
  asked = (shape, shape, given.get("mask", MASK), given.get("scores", PLAIN))
  dtype = given.get("dtype", jnp.bfloat16)
  with pytest.raises(UserError, match=rf"^model\.attention\.kernel={kernel} .*{reason}") as caught:
    choose(kernel, platform, *asked, dtype)
  assert "\n" not in str(caught.value)
  assert choose("auto", platform, *asked, dtype) != kernel


def test_what_cudnn_can_do_beside():
  assert choose("cudnn", "gpu", (1, 255, 2, 64), (1, 255, 2, 64), MASK, PLAIN) == "cudnn"
  assert choose("cudnn", "gpu", (1, 1, 2, 64), (1, 255, 2, 64), CACHE, PLAIN) == "cudnn"
