"""Attention's inner product, computed four ways: direct, blockwise, splash (TPU), cudnn (GPU). All
compute softmax(cap(q kᵀ · scale) + bias) v within the mask, softmax in fp32. `direct` keeps the
weights for the backward pass; `blockwise` recomputes them a strip of queries at a time and needs
O(t) memory in both directions; the other two are the platforms' own kernels."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.core.platform import platform
from llmjax.nn.attention import platform_kernels
from llmjax.nn.attention.mask import Mask
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
    mask: which keys each query attends to; each query that matters attends to at least one.
    kernel: one of `KERNELS`; auto takes the platform's where it supports the arguments.
    block: queries of a block of blockwise attention; splash's tile derives from it.
    table: from letters to mesh axes, for a kernel that runs on each device by itself.
  Returns:
    o_btnh, dtype of `q_btnh`, with the checkpoint name "attention"; splash's sums have it too, or
    its backward pass would repeat its forward pass.
  Raises:
    UserError: a kernel that was asked for by name does not support this.
  Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped: Ainslie et al. 2023,
    arXiv:2305.13245; blockwise: Rabe & Staats 2021, arXiv:2112.05682; soft cap: Gemma team 2024,
    arXiv:2408.00118, sec. 2; sinks: OpenAI 2025, arXiv:2508.10925, sec. 2.
  """
  chosen = choose(kernel, platform(), q_btnh.shape, k_bskh.shape, mask, scores, q_btnh.dtype)
  if chosen in ("splash", "cudnn"):
    short = q_btnh.shape[-1] - v_bskh.shape[-1]
    v_bskh = jnp.pad(v_bskh, ((0, 0), (0, 0), (0, 0), (0, short))) if short else v_bskh
    if chosen == "splash":
      o_btnh = platform_kernels.splash(q_btnh, k_bskh, v_bskh, mask, scores, block, table)
    else:
      o_btnh = platform_kernels.cudnn(q_btnh, k_bskh, v_bskh, mask, scores)
      o_btnh = checkpoint_name(o_btnh, "attention")
    return o_btnh[..., :-short] if short else o_btnh
  one_block = chosen == "direct" or q_btnh.shape[1] <= block
  run = _attend_block if one_block else functools.partial(_blockwise, block=block)
  run = functools.partial(run, mask=mask, scores=scores)
  return checkpoint_name(_head_major(run, q_btnh * scores.scale, k_bskh, v_bskh), "attention")


def choose(
  kernel: str, platform: str, q_shape, k_shape, mask: Mask, scores: Scores, dtype=jnp.bfloat16
) -> str:
  """Names the kernel that `attend` runs; `platform` is jax's name: cpu, gpu, tpu.

  Raises:
    UserError: the named kernel does not support this, with the reason.
  """
  reasons = {
    "splash": platform_kernels.splash_cannot(platform, q_shape, k_shape, mask, scores),
    "cudnn": platform_kernels.cudnn_cannot(platform, q_shape, k_shape, mask, scores, dtype),
  }
  if kernel == "auto":
    long = q_shape[1] * k_shape[1] > _DIRECT_POSITIONS**2
    if long and (scores.bias is not None or not platform_kernels.masked_by_rule(mask)):
      reasons.pop("cudnn")  # it would be given a mask or bias of [t, s]
    fit = [name for name, reason in reasons.items() if reason is None]
    return (*fit, "blockwise" if long else "direct")[0]
  if reasons.get(kernel):
    raise UserError(f"model.attention.kernel={kernel} {reasons[kernel]}")
  return kernel


def _head_major(run: Callable, q_btnh, k_bskh, v_bskh):
  """Calls (q_bkgth, k_bksh, v_bksh) → o_bkgth, twice as fast on CPU as contracting "btkgh,bskh"."""
  b, t, n, h = q_btnh.shape
  k = k_bskh.shape[2]
  q_bkgth = q_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  o_bkgth = run(q_bkgth, k_bskh.swapaxes(1, 2), v_bskh.swapaxes(1, 2))
  return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)


def attention_weights(q_btnh, k_bskh, mask: Mask, scores: Scores):
  """Computes the softmax that `attend` weighs values with: weights_bnts, fp32.

  Arguments as of `attend`. Keys that the mask excludes have the weight 0; a sink's share is
  missing from the sum of a row.
  """
  run = lambda q, k, _: _softmax(_masked_scores(q, k, mask, scores), scores)  # noqa: E731
  weights_btns = _head_major(run, q_btnh * scores.scale, k_bskh, k_bskh)
  return jnp.where(mask.allowed()[:, None], weights_btns.swapaxes(1, 2), 0)


def _attend_block(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores):
  weights_bkgts = _softmax(_masked_scores(q_bkgth, k_bksh, mask, scores), scores)
  return _weigh(weights_bkgts, v_bksh, q_bkgth.dtype)


def _softmax(s_bkgts, scores: Scores):
  """The softmax over keys and, where there is one, the sink."""
  if scores.sinks_n is None:
    return jax.nn.softmax(s_bkgts, axis=-1)
  sink = scores.sinks_n.reshape(*s_bkgts.shape[1:3], 1, 1)
  high = jax.lax.stop_gradient(jnp.maximum(s_bkgts.max(-1, keepdims=True), sink))
  exp = jnp.exp(s_bkgts - high)
  return exp / (exp.sum(-1, keepdims=True) + jnp.exp(sink - high))


def _weigh(weights_bkgts, v_bksh, dtype, out_dtype=None):
  b, k, g, t, s = weights_bkgts.shape
  weights = weights_bkgts.astype(dtype).reshape(b, k, g * t, s)
  return dot("bkqs,bksh->bkqh", weights, v_bksh, out_dtype).reshape(b, k, g, t, -1)


def _masked_scores(q_bkgth, k_bksh, mask: Mask, scores: Scores):
  """s_bkgts, fp32, without any sink."""
  b, k, g, t, h = q_bkgth.shape
  q_bkqh = q_bkgth.reshape(b, k, g * t, h)  # a key head's g queries share an axis
  s_bkgts = dot("bkqh,bksh->bkqs", q_bkqh, k_bksh, jnp.float32).reshape(b, k, g, t, -1)
  if scores.softcap:
    s_bkgts = scores.softcap * jnp.tanh(s_bkgts / scores.softcap)
  if scores.bias is not None:
    bias_bnts = scores.bias.scores(mask.q_positions_bt, mask.k_positions_bs)
    s_bkgts += bias_bnts.reshape(bias_bnts.shape[0], k, g, t, -1)
  return jnp.where(mask.allowed()[:, None, None], s_bkgts, jnp.finfo(jnp.float32).min)


def attend_partially(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, block: int):
  """Computes attention over some of the keys, and the log of its softmax's denominator.

  Results over different keys combine as o = Σ oᵢ exp(lseᵢ - lse), lse = log Σ exp lseᵢ. Arguments
  as `attend` takes, but all keys of a query may be masked, and sinks are not added.

  Returns:
    (o_btnh, lse_btn), fp32.
  """
  attend_block = jax.checkpoint(functools.partial(_attend_with_lse, scores=scores))
  run = functools.partial(_loop_blocks, attend_block, mask=mask, block=min(block, q_btnh.shape[1]))
  o_btnh = _head_major(run, q_btnh * scores.scale, k_bskh, v_bskh)
  return o_btnh[..., :-1], o_btnh[..., -1]


def _attend_with_lse(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores):
  """A block's result with the log of the denominator as one more channel, fp32."""
  s_bkgts = _masked_scores(q_bkgth, k_bksh, mask, scores)
  high = jax.lax.stop_gradient(s_bkgts.max(-1, keepdims=True))
  exp = jnp.exp(s_bkgts - high)
  total = exp.sum(-1, keepdims=True)
  o_bkgth = _weigh(exp / total, v_bksh, q_bkgth.dtype, jnp.float32)
  return jnp.concatenate([o_bkgth, high + jnp.log(total)], axis=-1)


def _blockwise(q_bkgth, k_bksh, v_bksh, mask: Mask, scores: Scores, block: int):
  """Blocks of queries in a few groups, each with the keys that its rule does not mask."""
  t, s = q_bkgth.shape[3], k_bksh.shape[2]
  attend_block = jax.checkpoint(functools.partial(_attend_block, scores=scores))
  size = -(-t // (block * _GROUPS)) * block  # queries of a group
  results = []
  for start in range(0, t, size):
    stop = min(t, start + size)
    queries, keys = slice(start, stop), slice(*mask.key_range(start, stop, s))
    q, k, v = q_bkgth[:, :, :, queries], k_bksh[:, :, keys], v_bksh[:, :, keys]
    results.append(_loop_blocks(attend_block, q, k, v, mask.tile(queries, keys), block))
  return jnp.concatenate(results, axis=3)


def _loop_blocks(attend_block, q_bkgth, k_bksh, v_bksh, mask: Mask, block: int):
  """Runs full blocks of queries as a loop, and the remaining queries by themselves."""
  t = q_bkgth.shape[3]
  looped = t // block * block if t >= 2 * block else 0
  results = []
  if looped:

    def run(arrays):
      q_bkgth, positions, segments = arrays
      block_mask = dataclasses.replace(mask, q_positions_bt=positions, q_segments_bt=segments)
      return attend_block(q_bkgth, k_bksh, v_bksh, block_mask)

    def blocks(array, axis):  # the blocks of an axis come first; the remainder is dropped
      array = jax.lax.slice_in_dim(array, 0, looped, axis=axis)
      shape = (*array.shape[:axis], looped // block, block, *array.shape[axis + 1 :])
      return jnp.moveaxis(array.reshape(shape), axis, 0)

    ids = jax.tree.map(lambda ids: blocks(ids, 1), (mask.q_positions_bt, mask.q_segments_bt))
    out = jax.lax.map(run, (blocks(q_bkgth, 3), *ids))
    results.append(jnp.moveaxis(out, 0, 3).reshape(*q_bkgth.shape[:3], looped, -1))
  if looped < t:
    rest = mask.tile(slice(looped, t), slice(None))
    results.append(attend_block(q_bkgth[:, :, :, looped:], k_bksh, v_bksh, rest))
  return jnp.concatenate(results, axis=3)
