"""The key/value cache of decoding: slot number is position, written in place of what was there."""

import dataclasses

import jax
import jax.numpy as jnp

_ROWS = 32  # of a batch up to which each row is written by itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer, or stacked over layers (`lbksh`).

  Heads stand before slots: each head's keys are then one matrix in memory, which decoding reads as
  it lies.

  Attributes:
    key_bksh: keys, already rotated.
    value_bksh: values; None where they come out of what stands for a key (latent attention).
  """

  key_bksh: jax.Array
  value_bksh: jax.Array | None = None

  @classmethod
  def of(cls, key_bskh, value_bskh) -> "KVCache":
    """Takes what projections give."""
    return cls(key_bskh.swapaxes(1, 2), value_bskh.swapaxes(1, 2))

  @property
  def key_bskh(self) -> jax.Array:
    """Keys of one layer, slots first."""
    return self.key_bksh.swapaxes(-3, -2)

  @property
  def value_bskh(self) -> jax.Array:
    """Values of one layer, slots first."""
    return self.value_bksh.swapaxes(-3, -2)

  def write(self, new: "KVCache", positions_bt) -> "KVCache":
    """Returns the cache with each row's new keys and values at their positions.

    Positions must be slots of the cache.
    """
    put = _put_one if positions_bt.shape[1] == 1 and len(positions_bt) <= _ROWS else _put
    return jax.tree.map(
      lambda old, new: put(old, new.astype(old.dtype), positions_bt), self, new
    )


def _put(old_bksh, new_bkth, positions_bt):
  rows = jnp.arange(positions_bt.shape[0])[:, None]
  return old_bksh.at[rows, :, positions_bt].set(new_bkth.swapaxes(1, 2))


def _put_one(old_bksh, new_bk1h, positions_b1):
  """Writes one position a row, in place; a scatter would copy the cache on CPU."""
  # Without dimensions of one, the form that `Cache.squeeze` has it carried in.
  kept = [axis for axis in range(4) if axis > 1 or old_bksh.shape[axis] > 1]
  bare = old_bksh.reshape([old_bksh.shape[axis] for axis in kept])
  for row in range(len(old_bksh)):
    new = new_bk1h[row : row + 1]
    start = (row, 0, positions_b1[row, 0], 0)
    bare = jax.lax.dynamic_update_slice(
      bare, new.reshape([new.shape[axis] for axis in kept]), [start[axis] for axis in kept]
    )
  return bare.reshape(old_bksh.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """All that decoding keeps of a stack of layers.

  Attributes:
    own: keys and values of the row itself, stacked over layers or a tuple of them.
    source: likewise of what cross attention looks at; None without it.
    source_segments_bs: int32 numbers of the source's documents; None without it.
    prefix_bs: bool, slots that every query sees (prefix-LM); None without them.
  """

  own: KVCache | tuple[KVCache, ...]
  source: KVCache | tuple[KVCache, ...] | None = None
  source_segments_bs: jax.Array | None = None
  prefix_bs: jax.Array | None = None

  @property
  def slots(self) -> int:
    """Positions there is room for."""
    return jax.tree.leaves(self.own)[0].shape[-2]

  def squeeze(self) -> "Cache":
    """Drops a lone row's batch dimension and latents' one head, for a loop to carry; `batched`
    restores them.

    That is the form attention multiplies. Carried in the other, XLA's CPU backend writes the cache
    once for the loop and once for attention, each time into a copy. All else is left as it is.
    """

    def bare(leaf, latent):
      leaf = leaf[:, 0] if latent and leaf.ndim == 4 else leaf
      return leaf[0] if leaf.ndim == 4 - latent and len(leaf) == 1 else leaf

    return self._each(bare)

  def unsqueeze(self) -> "Cache":
    """Undoes `alone`."""

    def whole(leaf, latent):
      leaf = leaf[None] if leaf.ndim == 3 - latent else leaf
      return leaf[:, None] if latent and leaf.ndim == 3 else leaf

    return self._each(whole)

  def _each(self, change) -> "Cache":
    def each(one: KVCache):
      return jax.tree.map(lambda leaf: change(leaf, one.value_bksh is None), one)

    is_one = lambda node: isinstance(node, KVCache)  # noqa: E731
    return dataclasses.replace(self, own=jax.tree.map(each, self.own, is_leaf=is_one))
