"""The key/value cache of decoding, with the position of every key. The key of position p is written
to slot p mod slots: a cache as long as the text keeps every key, and a shorter one is a ring buffer
of the last ones, which is all that a window layer needs."""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.parallel.rules import shard

_UNROLLED_ROWS = 32  # largest batch whose rows are written one after another, each in place
_NEVER = 2**30  # stands for the position of an empty slot in masks: later than every query


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer, heads before slots: the keys of a head are contiguous in memory.

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
    return self.key_bksh.swapaxes(-3, -2)

  @property
  def value_bskh(self) -> jax.Array:
    return self.value_bksh.swapaxes(-3, -2)

  def write(self, new: "KVCache", positions_bt) -> "KVCache":
    """Returns the cache with new keys and values at their positions.

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
  """Constrains keys and values to the mesh in scope; a lone head is replicated."""
  return jax.tree.map(lambda leaf: shard(leaf, "b1sh" if leaf.shape[1] == 1 else "bksh"), cache)


def _slots(positions_bt, slots: int):
  """The slot of every position; `slots`, which does not exist, for those that are not kept."""
  last_b1 = positions_bt.max(axis=1, keepdims=True)
  kept_bt = (positions_bt >= 0) & (positions_bt > last_b1 - slots)
  return jnp.where(kept_bt, positions_bt % slots, slots)


def _put(old_bksh, new_bkth, slots_bt):
  put_row = lambda old_ksh, new_kth, slots_t: old_ksh.at[:, slots_t].set(new_kth, mode="drop")  # noqa: E731
  return jax.vmap(put_row)(old_bksh, new_bkth, slots_bt)


def _put_one(old_bksh, new_bk1h, slots_b1):
  """Writes one position of every row, in place; a scatter would copy the cache on CPU."""
  # Without dimensions of size one, as a loop carries the cache (`Cache.squeeze`).
  kept = [axis for axis in range(4) if axis > 1 or old_bksh.shape[axis] > 1]
  select = lambda values: [values[axis] for axis in kept]  # noqa: E731
  squeezed = old_bksh.reshape(select(old_bksh.shape))
  for row in range(len(old_bksh)):
    new, start = new_bk1h[row : row + 1], (row, 0, slots_b1[row, 0], 0)
    squeezed = jax.lax.dynamic_update_slice(
      squeezed, new.reshape(select(new.shape)), select(start)
    )
  return squeezed.reshape(old_bksh.shape)


def _put_positions(old_bs, positions_bt):
  slots_bt = _slots(positions_bt, old_bs.shape[1])
  if slots_bt.shape[1] == 1:
    return jnp.where(jnp.arange(old_bs.shape[1]) == slots_bt, positions_bt, old_bs)
  return _put(old_bs[:, None, :, None], positions_bt[:, None, :, None], slots_bt)[:, 0, :, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The cache of a stack of layers.

  Attributes:
    layers: keys and values of self-attention in every layer.
    positions: for every kind of layer, the position of the key in each slot (position_bs, int32);
      -1 where a slot is empty, whatever its key then is.
    kinds: the kind of every layer.
    slots: most positions of a row.
    source: keys and values of cross-attention in every layer, or None.
    source_segments_bs: int32 segment numbers of the source, or None.
    prefix_b: int32, how many first positions every query attends to (prefix-LM), or None.
  """

  layers: tuple[KVCache, ...]
  positions: dict[str, jax.Array]
  kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
  slots: int = dataclasses.field(metadata={"static": True})
  source: tuple[KVCache, ...] | None = None
  source_segments_bs: jax.Array | None = None
  prefix_b: jax.Array | None = None

  def seen_positions(self, kind: str) -> tuple:
    """What `cache_mask` takes of a kind of layer: (k_positions_bs, prefix_bs)."""
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
      prefix_bt: bool, positions that, like all before them, every query of their row attends to.
    """
    positions = {
      kind: _put_positions(old_bs, positions_bt) for kind, old_bs in self.positions.items()
    }
    prefix_b = self.prefix_b
    if prefix_b is not None and prefix_bt is not None:
      prefix_b = jnp.maximum(prefix_b, jnp.where(prefix_bt, positions_bt + 1, 0).max(axis=1))
    return dataclasses.replace(self, positions=positions, prefix_b=prefix_b)

  def resize(self, like: "Cache") -> "Cache":
    """Moves the last keys that fit to as many slots as another, perhaps abstract, cache has."""
    positions, layers = dict(self.positions), []
    for kind, layer in zip(self.kinds, self.layers, strict=True):
      old_bs, slots = self.positions[kind], like.positions[kind].shape[1]
      if old_bs.shape[1] != slots:
        positions[kind] = _put_positions(jnp.full((len(old_bs), slots), -1, jnp.int32), old_bs)
        zeros = lambda a, s=slots: jnp.zeros((*a.shape[:2], s, a.shape[3]), a.dtype)  # noqa: E731
        layer = jax.tree.map(zeros, layer).write(layer, old_bs)
      layers.append(layer)
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
    once for the loop and once for attention, each time into a copy.
    """

    def squeeze(leaf, latent):
      leaf = leaf[:, 0] if latent and leaf.ndim == 4 else leaf
      return leaf[0] if leaf.ndim == 4 - latent and len(leaf) == 1 else leaf

    return self._map_leaves(squeeze)

  def unsqueeze(self) -> "Cache":
    """Undoes `squeeze`."""

    def unsqueeze(leaf, latent):
      leaf = leaf[None] if leaf.ndim == 3 - latent else leaf
      return leaf[:, None] if latent and leaf.ndim == 3 else leaf

    return self._map_leaves(unsqueeze)

  def _map_leaves(self, change) -> "Cache":
    layers = tuple(
      jax.tree.map(lambda leaf, latent=layer.value_bksh is None: change(leaf, latent), layer)
      for layer in self.layers
    )
    return dataclasses.replace(self, layers=layers)
