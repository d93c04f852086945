"""Attention of rows whose positions are cut along mesh axis `context`: three ways, same result.

`ring` sends keys and values round (nn/attention/ring.py), `gather` fetches all to every device, and
`all_to_all` exchanges positions for heads before and after.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core.errors import UserError
from llmjax.nn.attention.kernels import attend
from llmjax.nn.attention.mask import Mask
from llmjax.nn.attention.ring import ring_attend
from llmjax.nn.attention.scores import Scores
from llmjax.parallel.rules import ACTIVATIONS, inside, shards, spec

CONTEXTS = ("ring", "gather", "all_to_all")
_HEADS = ACTIVATIONS | {"t": None, "n": ("tensor", "context"), "k": ("tensor", "context")}


def attend_cut(
  q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, kernel: str, block: int, context: str
):
  """Computes `attend` where `context` is more than one device, and `attend` itself where it is not.

  Keys of another row (cross attention) are always gathered, and so are those of a ring inside a
  pipeline: its permutes want all devices at once, and there each stage does something else. Under
  `ring` and `gather` the kernel is one that works on rectangles of the mask: direct or blockwise.
  Arguments as `attend` takes; `context` is one of `CONTEXTS`.

  Raises:
    UserError: all_to_all has fewer heads than devices to give them to.
  Source: gather: Llama 3, arXiv:2407.21783, sec. 3.3.2; all_to_all: Jacobs et al. 2023,
    arXiv:2309.14509.
  """
  if shards("t", ACTIVATIONS) == 1:
    return attend(q_btnh, k_bskh, v_bskh, mask, scores, kernel, block)
  if context == "all_to_all" and mask.aligned:
    return _all_to_all(q_btnh, k_bskh, v_bskh, mask, scores, kernel, block)
  if context == "ring" and mask.aligned and not inside("stage"):
    return ring_attend(q_btnh, k_bskh, v_bskh, mask, scores, block)
  return _gather(q_btnh, k_bskh, v_bskh, mask, scores, block)


def check_heads(n: int, devices: int):
  """Raises a `UserError` where all_to_all has not as many query heads for each device."""
  if n % devices:
    raise UserError(
      f"model.attention.context_parallel=all_to_all gives every device heads, and {n} "
      f"query heads do not divide over tensor × context = {devices}; use ring or gather"
    )


def _gather(q_btnh, k_bskh, v_bskh, mask: Mask, scores: Scores, block: int):
  """Each device's own queries against everybody's keys."""

  def local(queries, keys, extra):
    q, q_positions, q_segments = queries
    keys = jax.tree.map(lambda a: jax.lax.all_gather(a, "context", axis=1, tiled=True), keys)
    k, v, k_positions, k_segments, prefix = keys
    part = Mask(q_positions, k_positions, q_segments, k_segments, prefix, mask.rule)
    made = dataclasses.replace(scores, bias=extra[0], sinks_n=extra[1])
    return attend(q, k, v, part, made, "blockwise", block)

  cut, whole = PartitionSpec(None, "context"), PartitionSpec()
  queries = (q_btnh, mask.q_positions_bt, mask.q_segments_bt)
  keys = (k_bskh, v_bskh, mask.k_positions_bs, mask.k_segments_bs, mask.prefix_bs)
  return jax.shard_map(
    local, in_specs=(cut, cut, whole), out_specs=cut, axis_names={"context"}, check_vma=False
  )(queries, keys, (scores.bias, scores.sinks_n))


def _all_to_all(q_btnh, k_bskh, v_bskh, mask, scores, kernel, block):
  """Whole rows of fewer heads; key heads are repeated until there is one for every device."""
  devices, n, k = shards("n", _HEADS), q_btnh.shape[2], k_bskh.shape[2]
  check_heads(n, devices)
  if k % devices:
    k_bskh, v_bskh = (jnp.repeat(a, n // k, axis=2) for a in (k_bskh, v_bskh))
  put = lambda a: jax.lax.with_sharding_constraint(a, spec("btnh", _HEADS))  # noqa: E731
  o_btnh = attend(put(q_btnh), put(k_bskh), put(v_bskh), mask, scores, kernel, block, _HEADS)
  return put(o_btnh)
