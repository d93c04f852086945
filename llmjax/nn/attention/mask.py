"""Attention masks as a static rule with positions and segments, not as [t, s] arrays. Any tile of
the mask can be computed by itself, so blockwise attention needs O(t) memory and fully masked key
blocks are skipped."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MaskSpec:
  """Which keys of its own document a query attends to.

  Attributes:
    causal: keys up to the query's position only.
    window: keys less than this many positions away; 0 is no limit.
    sparse_block: positions of a block of the block-sparse pattern; 0 is dense. The other keys are
      as in `AttentionConfig`.
  """

  causal: bool = True
  window: int = 0
  sparse_block: int = 0
  sparse_local: int = 1
  sparse_global: int = 0
  sparse_stride: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """A rule and the positions it applies to.

  Attributes:
    q_positions_bt: int32 position of each query within its document; `k_positions_bs` of each key.
    q_segments_bt: int32 document of each query, 0 for padding; `k_segments_bs` of each key. None:
      all are of one document.
    prefix_bs: bool, keys that every query of the document attends to, earlier or later; or None.
    rule: static.
    aligned: queries and keys are the same tokens of a row, in ascending order of position.
  """

  q_positions_bt: jax.Array
  k_positions_bs: jax.Array
  q_segments_bt: jax.Array | None = None
  k_segments_bs: jax.Array | None = None
  prefix_bs: jax.Array | None = None
  rule: MaskSpec = dataclasses.field(default=MaskSpec(), metadata={"static": True})
  aligned: bool = dataclasses.field(default=False, metadata={"static": True})

  def allowed(self):
    """Computes mask_bts, bool, true where query t attends to key s."""
    query, key = self.q_positions_bt[:, :, None], self.k_positions_bs[:, None, :]
    ok_bts = _in_rule(self.rule, query, key)
    if self.prefix_bs is not None:
      ok_bts |= self.prefix_bs[:, None, :]
    if self.q_segments_bt is not None:
      ok_bts &= self.q_segments_bt[:, :, None] == self.k_segments_bs[:, None, :]
    return ok_bts

  def tile(self, queries: slice, keys: slice) -> "Mask":
    """The mask of some queries and some keys."""
    take = lambda arrays, ids: jax.tree.map(lambda array: array[:, ids], arrays)  # noqa: E731
    q_positions_bt, q_segments_bt = take((self.q_positions_bt, self.q_segments_bt), queries)
    k_positions_bs, k_segments_bs, prefix_bs = take(
      (self.k_positions_bs, self.k_segments_bs, self.prefix_bs), keys
    )
    return Mask(q_positions_bt, k_positions_bs, q_segments_bt, k_segments_bs, prefix_bs, self.rule)

  def key_range(self, start: int, stop: int, keys: int) -> tuple[int, int]:
    """Bounds the keys that are not masked for all of the queries from `start` to before `stop`.

    Returns:
      (first, end) of the keys.
    """
    first, end = 0, keys
    if self.aligned and self.prefix_bs is None:
      if self.rule.window:
        first = max(0, start - self.rule.window + 1)
        end = min(keys, stop + self.rule.window - 1)
      if self.rule.causal:
        end = min(end, stop)
    return first, end


def _in_rule(rule: MaskSpec, query, key):
  ok = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
  if rule.causal:
    ok &= query >= key
  if rule.window:
    ok &= jnp.abs(query - key) < rule.window
  if rule.sparse_block:
    query_block, key_block = query // rule.sparse_block, key // rule.sparse_block
    distance = jnp.abs(query_block - key_block)
    sparse_ok = distance < rule.sparse_local
    sparse_ok |= (key_block < rule.sparse_global) | (query_block < rule.sparse_global)
    if rule.sparse_stride:
      sparse_ok |= distance % rule.sparse_stride == 0
    ok &= sparse_ok
  return ok


def self_mask(rule: MaskSpec, segments_bt, positions_bt, prefix_bt=None) -> Mask:
  """The mask of self-attention of rows without a cache; arguments as of `Mask`."""
  return Mask(
    positions_bt, positions_bt, segments_bt, segments_bt, prefix_bt, rule, aligned=True
  )


def cache_mask(rule: MaskSpec, positions_bt, k_positions_bs, prefix_bs=None) -> Mask:
  """The mask of queries and the slots of a cache, whose keys may lie in any order.

  Args:
    rule: a causal one, or empty slots would not be masked.
    k_positions_bs: int32 position of the key in each slot; later than every query for empty ones.
    prefix_bs: bool, keys that every query attends to.
  """
  return Mask(positions_bt, k_positions_bs, prefix_bs=prefix_bs, rule=rule)


def cross_mask(segments_bt, positions_bt, source_segments_bs) -> Mask:
  """The mask of cross-attention: all of the source with the same segment number."""
  source_positions_bs = jnp.broadcast_to(
    jnp.arange(source_segments_bs.shape[1]), source_segments_bs.shape
  )
  rule = MaskSpec(causal=False)
  return Mask(positions_bt, source_positions_bs, segments_bt, source_segments_bs, rule=rule)
