"""Attention's inner product, computed four ways: direct, blockwise, splash (TPU), cudnn (GPU).

All compute softmax(cap(q kᵀ · scale) + bias) v within the mask, softmax in fp32. `direct` keeps the
[t, s] weights for the backward pass; `blockwise` recomputes them a strip of queries at a time and
needs O(t) memory in both directions; the other two are the platforms' own kernels.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.dot import contract
from llmjax.core.errors import UserError
from llmjax.core.platform import platform
from llmjax.nn.attention.mask import Mask
from llmjax.nn.attention.platform_kernels import (
  cudnn,
  cudnn_cannot,
  masked_by_rule,
  splash,
  splash_cannot,
)
from llmjax.nn.attention.scores import Scores
from llmjax.parallel.rules import ACTIVATIONS

KERNELS = ("auto", "direct", "blockwise", "splash", "cudnn")
_DIRECT_POSITIONS = 1024  # up to here `auto` keeps the weights: faster, and small
_GROUPS = 8  # of query blocks that share a range of keys


def attend(
  q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, kernel="auto", block=128, table=ACTIVATIONS
):
  """Computes softmax(q kᵀ · scale) v within the mask.

  Args:
    q_btnh: queries, compute dtype.
    k_bskh: keys; n is a multiple of k, and query head i reads key head i // g.
    v_bskh: values, whose head width may be smaller.
    mask: who may look at whom; each query that matters sees at least one key.
    scores: scale, soft cap, bias and sinks.
    kernel: one of `KERNELS`; auto takes the platform's where it can do what is asked.
    block: queries a strip of blockwise attention, and the tile of splash.
    table: from letters to mesh axes, for a kernel that runs on each device by itself.
  Returns:
    o_btnh, dtype of `q_btnh`; `named` attention, as are splash's sums, without which its backward
    pass would take its forward pass again.
  Raises:
    UserError: a kernel that was asked for by name cannot do this.
  Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped: Ainslie et al. 2023,
    arXiv:2305.13245; blockwise: Rabe & Staats 2021, arXiv:2112.05682; soft cap: Gemma team 2024,
    arXiv:2408.00118, sec. 2; sinks: OpenAI 2025, arXiv:2508.10925, sec. 2.
  """
  chosen = choose(kernel, platform(), q_btnh.shape, k_bskh.shape, mask, scores, q_btnh.dtype)
  if chosen in ("splash", "cudnn"):
    short = q_btnh.shape[-1] - v_bskh.shape[-1]
    v_bskh = jnp.pad(v_bskh, ((0, 0), (0, 0), (0, 0), (0, short))) if short else v_bskh
    if chosen == "splash":
      o_btnh = splash(q_btnh, k_bskh, v_bskh, mask, scores, block, table)
    else:
      o_btnh = checkpoint_name(cudnn(q_btnh, k_bskh, v_bskh, mask, scores), "attention")
    return o_btnh[..., :-short] if short else o_btnh
  if chosen == "direct" or q_btnh.shape[1] <= block:
    run = functools.partial(_strip, mask=mask, scores=scores)
  else:
    run = functools.partial(_blockwise, mask=mask, scores=scores, block=block)
  return checkpoint_name(_head_major(run, q_btnh * scores.scale, k_bskh, v_bskh), "attention")


def choose(
  kernel: str, platform: str, q_shape, k_shape, mask: Mask, scores: Scores, dtype=jnp.bfloat16
) -> str:
  """Names the kernel that `attend` runs; `platform` is jax's name: cpu, gpu, tpu.

  Raises:
    UserError: the named kernel cannot do this, with the reason.
  """
  reasons = {
    "splash": splash_cannot(platform, q_shape, k_shape, mask, scores),
    "cudnn": cudnn_cannot(platform, q_shape, k_shape, mask, scores, dtype),
  }
  if kernel == "auto":
    long = q_shape[1] * k_shape[1] > _DIRECT_POSITIONS**2
    if long and (scores.bias is not None or not masked_by_rule(mask)):
      reasons.pop("cudnn")  # it would be given a mask or bias of [t, s]
    fit = [name for name, reason in reasons.items() if reason is None]
    return (*fit, "blockwise" if long else "direct")[0]
  if reasons.get(kernel):
    raise UserError(f"model.attention.kernel={kernel} {reasons[kernel]}")
  return kernel


def _head_major(run: Callable, q_btnh, k_bskh, v_bskh):
  """Calls (q_bkgth, k_bksh, v_bksh) → o_bkgth; returns o_btnh.

  Each (b, k) is then two plain matrix products on contiguous operands, twice as fast on CPU as
  contracting "btkgh,bskh".
  """
  b, t, n, h = q_btnh.shape
  k = k_bskh.shape[2]
  q_bkgth = q_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  o_bkgth = run(q_bkgth, k_bskh.swapaxes(1, 2), v_bskh.swapaxes(1, 2))
  return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)


def _strip(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores):
  b, k, g, t, _ = q_bkgth.shape
  s_bkgts = _scored(q_bkgth, k_bksh, mask, scores)
  if scores.sinks_n is None:
    weights = jax.nn.softmax(s_bkgts, axis=-1)
  else:
    weights = _softmax_with_sink(s_bkgts, scores.sinks_n.reshape(k, g, 1, 1))
  weights = weights.astype(q_bkgth.dtype).reshape(b, k, g * t, -1)
  return contract("bkqs,bksh->bkqh", weights, v_bksh).reshape(b, k, g, t, -1)


def _scored(q_bkgth, k_bksh, mask: Mask, scores: Scores):
  """Masked scores s_bkgts, fp32, before any sink."""
  b, k, g, t, h = q_bkgth.shape
  # A key head's g queries go into one axis of g·t.
  q_bkqh = q_bkgth.reshape(b, k, g * t, h)
  s_bkgts = contract("bkqh,bksh->bkqs", q_bkqh, k_bksh, jnp.float32).reshape(b, k, g, t, -1)
  if scores.softcap:
    s_bkgts = scores.softcap * jnp.tanh(s_bkgts / scores.softcap)
  if scores.bias is not None:
    bias_bnts = scores.bias.scores(mask.q_positions_bt, mask.k_positions_bs)
    s_bkgts += bias_bnts.reshape(bias_bnts.shape[0], k, g, t, -1)
  return jnp.where(mask.allowed()[:, None, None], s_bkgts, jnp.finfo(jnp.float32).min)


def attend_part(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, block: int):
  """Computes attention over some of the keys, and the log of its softmax's denominator.

  Parts over different keys join as o = Σ oᵢ exp(lseᵢ - lse), lse = log Σ exp lseᵢ. Arguments as
  `attend` takes, but a query may see no key, and sinks have no part.

  Returns:
    (o_btnh, lse_btn), fp32.
  """
  strip = jax.checkpoint(functools.partial(_part, scores=scores))
  run = functools.partial(_group, strip, mask=mask, block=min(block, q_btnh.shape[1]))
  made_btnh = _head_major(run, q_btnh * scores.scale, k_bskh, v_bskh)
  return made_btnh[..., :-1], made_btnh[..., -1]


def _part(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores):
  """A strip's result with the log of the denominator as one more channel, fp32."""
  b, k, g, t, _ = q_bkgth.shape
  s_bkgts = _scored(q_bkgth, k_bksh, mask, scores)
  high = jax.lax.stop_gradient(s_bkgts.max(-1, keepdims=True))
  grown = jnp.exp(s_bkgts - high)
  total = grown.sum(-1, keepdims=True)
  weights = (grown / total).astype(q_bkgth.dtype).reshape(b, k, g * t, -1)
  o_bkgth = contract("bkqs,bksh->bkqh", weights, v_bksh, jnp.float32).reshape(b, k, g, t, -1)
  return jnp.concatenate([o_bkgth, high + jnp.log(total)], axis=-1)


def _softmax_with_sink(scores, sink):
  """Softmax over the last axis and one more entry, whose weight is dropped."""
  high = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
  grown = jnp.exp(scores - high)
  return grown / (grown.sum(-1, keepdims=True) + jnp.exp(sink - high))


def _blockwise(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores, block: int):
  """Strips of `block` queries; a few groups of strips, each with the keys that its rule leaves."""
  t, s = q_bkgth.shape[3], k_bksh.shape[2]
  strip = jax.checkpoint(functools.partial(_strip, scores=scores))
  strips = -(-t // block)
  size = -(-strips // _GROUPS) * block  # queries of a group
  made = []
  for start in range(0, t, size):
    stop = min(t, start + size)
    queries, keys = slice(start, stop), slice(*mask.key_range(start, stop, s))
    q, k, v = q_bkgth[:, :, :, queries], k_bksh[:, :, keys], v_bksh[:, :, keys]
    made.append(_group(strip, q, k, v, mask.tile(queries, keys), block))
  return jnp.concatenate(made, axis=3)


def _group(strip, q_bkgth, k_bksh, v_bksh, mask: Mask, block: int):
  """Runs the strips of one group: the whole ones as a loop, what is left over by itself."""
  t = q_bkgth.shape[3]
  whole = t // block * block if t >= 2 * block else 0
  made = []
  if whole:

    def run(piece):
      queries, positions, segments = piece
      part = dataclasses.replace(mask, q_positions_bt=positions, q_segments_bt=segments)
      return strip(queries, k_bksh, v_bksh, part)

    cut = functools.partial(_cut, block=block)
    pieces = cut(q_bkgth, 3), cut(mask.q_positions_bt, 1), cut(mask.q_segments_bt, 1)
    out = jax.lax.map(run, pieces)
    made.append(jnp.moveaxis(out, 0, 3).reshape(*q_bkgth.shape[:3], whole, -1))
  if whole < t:
    rest = mask.tile(slice(whole, t), slice(None))
    made.append(strip(q_bkgth[:, :, :, whole:], k_bksh, v_bksh, rest))
  return jnp.concatenate(made, axis=3)


def _cut(array, axis: int, block: int):
  """Cuts an axis into whole blocks, which come to the front; what is left over is dropped."""
  if array is None:
    return None
  blocks = array.shape[axis] // block
  array = jax.lax.slice_in_dim(array, 0, blocks * block, axis=axis)
  shape = (*array.shape[:axis], blocks, block, *array.shape[axis + 1 :])
  return jnp.moveaxis(array.reshape(shape), axis, 0)
