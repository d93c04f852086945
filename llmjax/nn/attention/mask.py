"""Who may look at whom, kept as a rule and never as a [t, s] array until a kernel asks for a tile.

The rule is static; segments and positions are arrays. Any rectangle of the mask can be computed by
itself, so blockwise attention needs O(t) memory, and tiles that a rule empties are skipped.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MaskSpec:
  """What a query may see of its own document.

  Attributes:
    causal: keys up to its own position only.
    window: keys less than so many positions away; 0 is no limit.
    sparse_block: positions of a block of the block-sparse pattern; 0 is dense.
    sparse_local: blocks that are seen: the own and the (sparse_local - 1) next to it.
    sparse_global: so many first blocks of a document see all and are seen by all.
    sparse_stride: every so many-th block away is seen as well; 0 is none.
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
    q_positions_bt: int32 place of each query within its document.
    k_positions_bs: int32 place of each key.
    q_segments_bt: int32 document of each query; 0 is padding. None: all are of one.
    k_segments_bs: int32 document of each key.
    prefix_bs: bool, keys that every query of the document sees, earlier or later. None: none.
    rule: static.
    aligned: queries and keys are the same places of a row, whose order is that of positions.
  """

  q_positions_bt: jax.Array
  k_positions_bs: jax.Array
  q_segments_bt: jax.Array | None = None
  k_segments_bs: jax.Array | None = None
  prefix_bs: jax.Array | None = None
  rule: MaskSpec = dataclasses.field(default=MaskSpec(), metadata={"static": True})
  aligned: bool = dataclasses.field(default=False, metadata={"static": True})

  def allowed(self):
    """Computes mask_bts, bool, true where query t may see key s."""
    query, key = self.q_positions_bt[:, :, None], self.k_positions_bs[:, None, :]
    ok_bts = _in_rule(self.rule, query, key)
    if self.prefix_bs is not None:
      ok_bts |= self.prefix_bs[:, None, :]
    if self.q_segments_bt is not None:
      ok_bts &= self.q_segments_bt[:, :, None] == self.k_segments_bs[:, None, :]
    return ok_bts

  def tile(self, queries: slice, keys: slice) -> "Mask":
    """Cuts the mask down to a rectangle."""
    take = lambda array, part: None if array is None else array[:, part]  # noqa: E731
    return dataclasses.replace(
      self,
      q_positions_bt=take(self.q_positions_bt, queries),
      k_positions_bs=take(self.k_positions_bs, keys),
      q_segments_bt=take(self.q_segments_bt, queries),
      k_segments_bs=take(self.k_segments_bs, keys),
      prefix_bs=take(self.prefix_bs, keys),
      aligned=False,
    )

  def key_range(self, start: int, stop: int, keys: int) -> tuple[int, int]:
    """Bounds the keys that queries `start` to `stop - 1` of a row can see: all outside are masked.

    Args:
      start: first query.
      stop: query to end before.
      keys: how many keys there are.
    Returns:
      (first, end) of the keys.
    """
    if not self.aligned:
      return 0, keys
    first, end = 0, keys
    if self.rule.window and self.prefix_bs is None:
      first = max(0, start - self.rule.window + 1)
      end = min(keys, stop + self.rule.window - 1)
    if self.rule.causal and self.prefix_bs is None:
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
    apart = jnp.abs(query_block - key_block)
    near = apart < rule.sparse_local
    near |= (key_block < rule.sparse_global) | (query_block < rule.sparse_global)
    if rule.sparse_stride:
      near |= apart % rule.sparse_stride == 0
    ok &= near
  return ok


def self_mask(rule: MaskSpec, segments_bt, positions_bt, prefix_bt=None) -> Mask:
  """Makes the mask of a row that looks at itself.

  Args:
    rule: who sees whom within a document.
    segments_bt: int32 document of each position; 0 is padding. None: one document.
    positions_bt: int32 place within the document.
    prefix_bt: bool, tokens that their whole document sees; None: none.
  """
  return Mask(
    positions_bt, positions_bt, segments_bt, segments_bt, prefix_bt, rule, aligned=True
  )


def cache_mask(rule: MaskSpec, positions_bt, k_positions_bs, prefix_bs=None) -> Mask:
  """Makes the mask of queries that see the slots of a cache, wherever its keys lie.

  Args:
    rule: what a query may see; causal, or empty slots would be seen.
    positions_bt: int32 position of each query.
    k_positions_bs: int32 position of the key in each slot; later than every query for empty ones.
    prefix_bs: bool, keys that every query sees.
  """
  return Mask(positions_bt, k_positions_bs, prefix_bs=prefix_bs, rule=rule)


def cross_mask(segments_bt, positions_bt, source_segments_bs) -> Mask:
  """Makes the mask of queries that look at a source: all of it that is of the same number."""
  source_positions_bs = jnp.broadcast_to(
    jnp.arange(source_segments_bs.shape[1]), source_segments_bs.shape
  )
  rule = MaskSpec(causal=False)
  return Mask(positions_bt, source_positions_bs, segments_bt, source_segments_bs, rule=rule)
