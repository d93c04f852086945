"""The key/value cache of decoding, which keeps the position of every key it holds.

The key of position p is written to slot p mod slots: a cache as long as the text keeps every key,
and a shorter one is a ring that keeps the last ones, which is all that a window layer needs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.parallel.rules import shard

_UNROLLED_ROWS = 32  # largest batch whose rows are written one after another, each in place
_NEVER = 2**30  # stands for the position of an empty slot in masks: later than every query


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer.

  Heads stand before slots: the keys of a head are then one matrix in memory, which decoding reads
  as it lies.

  Attributes:
    key_bksh: keys, already rotated.
    value_bksh: values; None where they are computed from the keys (latent attention).
  """

  key_bksh: jax.Array
  value_bksh: jax.Array | None = None

  @classmethod
  def of(cls, key_bskh, value_bskh) -> "KVCache":
    """Takes keys and values as projections return them, positions before heads."""
    return cls(key_bskh.swapaxes(1, 2), value_bskh.swapaxes(1, 2))

  @property
  def key_bskh(self) -> jax.Array:
    """Keys of one layer, slots before heads."""
    return self.key_bksh.swapaxes(-3, -2)

  @property
  def value_bskh(self) -> jax.Array:
    """Values of one layer, slots before heads."""
    return self.value_bksh.swapaxes(-3, -2)

  def write(self, new: "KVCache", positions_bt) -> "KVCache":
    """Returns the cache with the new keys and values of every row at their positions.

    Args:
      new: keys and values of t positions.
      positions_bt: int32; keys at negative positions (padding) and keys that later ones of the
        same call displace are dropped. A single position (t = 1) must not be negative.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_place = positions_bt.shape[1] == 1 and len(positions_bt) <= _UNROLLED_ROWS
    put = _put_one if in_place and (mesh.empty or mesh.size == 1) else _put
    slots_bt = _slots(positions_bt, self.key_bksh.shape[2])
    return shard_keys(
      jax.tree.map(lambda old, new: put(old, new.astype(old.dtype), slots_bt), self, new)
    )


def shard_keys(cache):
  """Constrains keys and values to the mesh in scope: rows as a batch's, heads over `tensor`."""
  one_head = lambda leaf: leaf.shape[1] == 1  # of latent attention, and of multi-query attention  # noqa: E731
  return jax.tree.map(lambda leaf: shard(leaf, "b1sh" if one_head(leaf) else "bksh"), cache)


def _slots(positions_bt, slots: int):
  """The slot of every position; `slots`, which is none, for those that are not kept."""
  last_b1 = positions_bt.max(axis=1, keepdims=True)
  kept_bt = (positions_bt >= 0) & (positions_bt > last_b1 - slots)
  return jnp.where(kept_bt, positions_bt % slots, slots)


def _put(old_bksh, new_bkth, slots_bt):
  put_row = lambda old_ksh, new_kth, slots_t: old_ksh.at[:, slots_t].set(new_kth, mode="drop")  # noqa: E731
  return jax.vmap(put_row)(old_bksh, new_bkth, slots_bt)


def _put_one(old_bksh, new_bk1h, slots_b1):
  """Writes one position of every row, in place; a scatter would copy the cache on CPU."""
  # Dimensions of size one are left out, the form in which `Cache.squeeze` has a loop carry it.
  kept = [axis for axis in range(4) if axis > 1 or old_bksh.shape[axis] > 1]
  bare = old_bksh.reshape([old_bksh.shape[axis] for axis in kept])
  for row in range(len(old_bksh)):
    new = new_bk1h[row : row + 1]
    start = (row, 0, slots_b1[row, 0], 0)
    bare = jax.lax.dynamic_update_slice(
      bare, new.reshape([new.shape[axis] for axis in kept]), [start[axis] for axis in kept]
    )
  return bare.reshape(old_bksh.shape)


def _put_positions(old_bs, positions_bt):
  slots_bt = _slots(positions_bt, old_bs.shape[1])
  if slots_bt.shape[1] == 1:
    return jnp.where(jnp.arange(old_bs.shape[1]) == slots_bt, positions_bt, old_bs)
  return _put(old_bs[:, None, :, None], positions_bt[:, None, :, None], slots_bt)[:, 0, :, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """All that decoding keeps of a stack of layers.

  Attributes:
    layers: keys and values of the row itself in every layer.
    positions: for every kind of layer, the position of the key in each slot (position_bs, int32);
      -1 where a slot is empty, whatever its key then is.
    kinds: the kind of every layer.
    slots: most positions of a row.
    source: keys and values that cross attention reads in every layer; None without it.
    source_segments_bs: int32 numbers of the source's documents; None without it.
    prefix_b: int32, how many first positions every query sees (prefix-LM); None without them.
  """

  layers: tuple[KVCache, ...]
  positions: dict[str, jax.Array]
  kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
  slots: int = dataclasses.field(metadata={"static": True})
  source: tuple[KVCache, ...] | None = None
  source_segments_bs: jax.Array | None = None
  prefix_b: jax.Array | None = None

  def seen_positions(self, kind: str) -> tuple:
    """What a mask asks: position_bs of a kind of layer, empty slots later than every query, and
    prefix_bs, true where every query sees a key (None without a prefix)."""
    position_bs = self.positions[kind]
    is_empty = position_bs < 0
    prefix_bs = None
    if self.prefix_b is not None:
      prefix_bs = ~is_empty & (position_bs < self.prefix_b[:, None])
    return jnp.where(is_empty, _NEVER, position_bs), prefix_bs

  def reserve(self, positions_bt, prefix_bt=None) -> "Cache":
    """Returns the cache whose slots are those of new positions, before layers write their keys.

    Args:
      positions_bt: int32, -1 for padding; every row's in ascending order.
      prefix_bt: bool, positions that every query of their row sees; all before them are as well.
    """
    positions = {
      kind: _put_positions(old_bs, positions_bt) for kind, old_bs in self.positions.items()
    }
    prefix_b = self.prefix_b
    if prefix_b is not None and prefix_bt is not None:
      prefix_b = jnp.maximum(prefix_b, jnp.where(prefix_bt, positions_bt + 1, 0).max(axis=1))
    return dataclasses.replace(self, positions=positions, prefix_b=prefix_b)

  def resize(self, like: "Cache") -> "Cache":
    """Moves the keys of unstacked layers to as many slots as those of another cache have.

    The last positions are kept where they become fewer. `like` may be abstract.
    """
    positions, layers = dict(self.positions), list(self.layers)
    for kind, old_bs in self.positions.items():
      slots = like.positions[kind].shape[1]
      if old_bs.shape[1] == slots:
        continue
      positions[kind] = _put_positions(jnp.full((len(old_bs), slots), -1, jnp.int32), old_bs)
      for number in (n for n, other in enumerate(self.kinds) if other == kind):
        empty = jax.tree.map(
          lambda a, slots=slots: jnp.zeros((*a.shape[:2], slots, a.shape[3]), a.dtype),
          layers[number],
        )
        layers[number] = empty.write(layers[number], old_bs)
    return dataclasses.replace(self, layers=tuple(layers), positions=positions, slots=like.slots)

  def truncate(self, length_b) -> "Cache":
    """Drops all keys at positions from `length_b` on, such as those of rejected draft tokens."""
    positions = {
      kind: jnp.where(position_bs < length_b[:, None], position_bs, -1)
      for kind, position_bs in self.positions.items()
    }
    return dataclasses.replace(self, positions=positions)

  def squeeze(self) -> "Cache":
    """Drops a lone row's batch dimension and latents' one head, for a loop to carry.

    That is the form attention multiplies. Carried in the other, XLA's CPU backend writes the cache
    once for the loop and once for attention, each time into a copy. All else is left as it is.
    """

    def bare(leaf, latent):
      leaf = leaf[:, 0] if latent and leaf.ndim == 4 else leaf
      return leaf[0] if leaf.ndim == 4 - latent and len(leaf) == 1 else leaf

    return self._map_leaves(bare)

  def unsqueeze(self) -> "Cache":
    """Undoes `squeeze`."""

    def full(leaf, latent):
      leaf = leaf[None] if leaf.ndim == 3 - latent else leaf
      return leaf[:, None] if latent and leaf.ndim == 3 else leaf

    return self._map_leaves(full)

  def _map_leaves(self, change) -> "Cache":
    def each(one: KVCache):
      return jax.tree.map(lambda leaf: change(leaf, one.value_bksh is None), one)

    is_one = lambda node: isinstance(node, KVCache)  # noqa: E731
    return dataclasses.replace(self, layers=jax.tree.map(each, self.layers, is_leaf=is_one))
