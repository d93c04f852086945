"""Attention by the platforms' own kernels: splash attention on TPU, cuDNN on NVIDIA GPUs. For each
there is a function that says what it does not support, for the user who named it."""

import functools

import jax
import jax.numpy as jnp

from llmjax.nn.attention.mask import Mask
from llmjax.nn.attention.scores import Scores
from llmjax.parallel.rules import spec


def splash_cannot(platform, q_shape, k_shape, mask: Mask, scores: Scores) -> str | None:
  """Says why splash attention cannot do this; None where it can. Arguments as `choose` takes."""
  if platform != "tpu":
    return f"runs on TPU only, and this is {platform}"
  if not mask.aligned or mask.prefix_bs is not None:
    return "needs self-attention without a cache and without a prefix"
  if scores.bias is not None:
    return "takes no bias by distance (alibi, relative)"
  if mask.rule.sparse_block:
    return "takes no block-sparse pattern"
  if q_shape[1] % 128 or q_shape[3] % 64:
    return f"wants positions in 128s and head widths in 64s, not {q_shape[1]} and {q_shape[3]}"
  return None


def splash(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, block: int, table: dict):
  """Splash attention, on each device by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  run = functools.partial(
    _splash_local, rule=mask.rule, scale=scores.scale, softcap=scores.softcap, block=block
  )
  arguments = (q_btnh, k_bskh, v_bskh, mask.q_segments_bt, scores.sinks_n)
  if mesh.empty:
    return run(*arguments)
  specs = tuple(spec(letters, table) for letters in ("btnh", "btkh", "btkh", "bt", "n"))
  # The kernel's outputs carry no record of which axes they vary over.
  return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def _splash_local(
  q_btnh, k_bskh, v_bskh, segments_bt, sinks_n, *, rule, scale, softcap, block, interpret=False
):
  # Here, because Pallas takes longer to import than the rest of the library.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  t, n = q_btnh.shape[1:3]
  mask = masks.CausalMask((t, t)) if rule.causal else masks.FullMask((t, t))
  if rule.window:
    reach = rule.window - 1
    mask = masks.LocalMask((t, t), (reach, 0 if rule.causal else reach), 0)
  size = splash_tile(block, t)
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * n),
    block_sizes=kernels.BlockSizes(*[size] * 8),  # forward, then those of k and v, then of q
    attn_logits_soft_cap=softcap or None,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name="attention",  # of its result and of the logs of its sums
    interpret=interpret,
  )

  def row(q_tnh, k_skh, v_skh, segments_t):
    segments = None if segments_t is None else kernels.SegmentIds(segments_t, segments_t)
    o_nth = kernel(
      (q_tnh * scale).swapaxes(0, 1), k_skh.swapaxes(0, 1), v_skh.swapaxes(0, 1), segments, sinks_n
    )
    return o_nth.swapaxes(0, 1).astype(q_tnh.dtype)

  return jax.vmap(row)(q_btnh, k_bskh, v_bskh, segments_bt)


def splash_tile(block: int, positions: int) -> int:
  """Positions of a side of splash attention's tiles, which it wants in 128s: at most 4 blocks."""
  sizes = (4 * block, 2 * block, block)
  return next((n for n in sizes if n % 128 == positions % n == 0), min(128, positions))


def cudnn_cannot(platform, q_shape, k_shape, mask: Mask, scores: Scores, dtype) -> str | None:
  """Says why cuDNN cannot do this; None where it can. Arguments as `choose` takes."""
  if platform not in ("gpu", "cuda"):
    return f"runs on NVIDIA GPUs only, and this is {platform}"
  if scores.softcap or scores.sinks_n is not None:
    return "knows neither a soft cap nor sinks"
  if q_shape[3] > 128 or q_shape[3] % 8:
    return f"wants head widths up to 128 in 8s, not {q_shape[3]}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"computes in bfloat16 or float16, not {jnp.dtype(dtype)}"
  # One query is a step of decoding, which has no backward pass.
  t, s = q_shape[1], k_shape[1]
  if (scores.bias is not None or not masked_by_rule(mask)) and t > 1 and (t % 2 or s % 2):
    return f"wants even numbers of queries and keys with such a mask or bias, not {t} and {s}"
  return None


def masked_by_rule(mask: Mask) -> bool:
  """Whether cuDNN can make the mask itself; it has windows beside causal masks only."""
  rule = mask.rule
  return (
    mask.aligned
    and mask.q_segments_bt is None
    and mask.prefix_bs is None
    and not rule.sparse_block
    and (rule.causal or not rule.window)
  )


def cudnn(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, implementation="cudnn"):
  """`jax.nn.dot_product_attention`; the mask goes in as a rule where it can, else as an array."""
  rule, by_rule = mask.rule, masked_by_rule(mask)
  bias = scores.bias
  if bias is not None:
    bias = bias.scores(mask.q_positions_bt, mask.k_positions_bs).astype(q_btnh.dtype)
  return jax.nn.dot_product_attention(
    q_btnh, k_bskh, v_bskh, bias, None if by_rule else mask.allowed()[:, None],
    scale=scores.scale,
    is_causal=by_rule and rule.causal,
    local_window_size=(rule.window - 1, 0) if by_rule and rule.window else None,
    implementation=implementation,
  )
