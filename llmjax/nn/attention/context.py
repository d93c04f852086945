"""Attention with context parallelism (positions sharded along `context`). `ring` is in
nn/attention/ring.py, `gather` all-gathers keys and values, and `all_to_all` exchanges the sharding
of positions for one of heads, before and after."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core.errors import UserError
from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import Mask
from llmjax.nn.attention.ring import ring_attend
from llmjax.nn.attention.scores import Scores
from llmjax.parallel.rules import ACTIVATIONS, inside, on_each_device, shards, spec

CONTEXTS = ("ring", "gather", "all_to_all")
_HEADS = ACTIVATIONS | {"t": None, "n": ("tensor", "context"), "k": ("tensor", "context")}


def attend_sharded(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, config):
  """Computes `attend`, by `config.context_parallel` where positions are sharded.

  Keys of cross-attention are always gathered, and so are those of a ring inside a pipeline: its
  permutes need all devices at once, and stages run different programs. `ring` and `gather` use the
  direct or the blockwise kernel.

  Args:
    q_btnh: queries; like `k_bskh`, `v_bskh`, `mask` and `scores` as `attend` takes them.
    config: `AttentionConfig`, for its kernel, block and context_parallel.
  Raises:
    UserError: all_to_all has fewer heads than devices to shard them over.
  Source: gather: Llama 3, arXiv:2407.21783, sec. 3.3.2; all_to_all: Jacobs et al. 2023,
    arXiv:2309.14509.
  """
  arguments = q_btnh, k_bskh, v_bskh, mask, scores
  if shards("t") == 1:
    return attend(*arguments, config.kernel, config.block)
  if config.context_parallel == "all_to_all" and mask.aligned:
    return _all_to_all(*arguments, config.kernel, config.block)
  if config.context_parallel == "ring" and mask.aligned and not inside("stage"):
    return ring_attend(*arguments, config.block)
  return _gather(*arguments, config.block)


def check_heads(n: int, devices: int):
  """Raises a `UserError` where all_to_all cannot shard the query heads."""
  if n % devices:
    raise UserError(
      f"model.attention.context_parallel=all_to_all gives every device heads, and {n} "
      f"query heads do not divide over tensor × context = {devices}; use ring or gather"
    )


def _gather(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, block: int):
  def local(queries, keys, bias, sinks_n):
    q, q_positions, q_segments = queries
    keys = jax.tree.map(lambda a: jax.lax.all_gather(a, "context", axis=1, tiled=True), keys)
    k, v, k_positions, k_segments, prefix = keys
    local_mask = Mask(q_positions, k_positions, q_segments, k_segments, prefix, mask.rule)
    local_scores = dataclasses.replace(scores, bias=bias, sinks_n=sinks_n)
    return attend(q, k, v, local_mask, local_scores, "blockwise", block)

  sharded, replicated = PartitionSpec(None, "context"), PartitionSpec()
  queries = (q_btnh, mask.q_positions_bt, mask.q_segments_bt)
  keys = (k_bskh, v_bskh, mask.k_positions_bs, mask.k_segments_bs, mask.prefix_bs)
  run = on_each_device(local, (sharded, sharded, replicated, replicated), sharded, "context")
  return run(queries, keys, scores.bias, scores.sinks_n)


def _all_to_all(q_btnh, k_bskh, v_bskh, mask, scores, kernel, block):
  devices, n, k = shards("n", _HEADS), q_btnh.shape[2], k_bskh.shape[2]
  check_heads(n, devices)
  if k % devices:  # too few key heads to shard
    k_bskh, v_bskh = (jnp.repeat(a, n // k, axis=2) for a in (k_bskh, v_bskh))
  reshard = lambda a: jax.lax.with_sharding_constraint(a, spec("btnh", _HEADS))  # noqa: E731
  qkv = (reshard(array) for array in (q_btnh, k_bskh, v_bskh))
  return reshard(attend(*qkv, mask, scores, kernel, block, _HEADS))
