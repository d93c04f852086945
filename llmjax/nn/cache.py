"""The key/value cache of decoding: slot number is position, written in place of what was there."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer, or stacked over layers (`lbskh`).

  Attributes:
    key_bskh: keys, already rotated.
    value_bskh: values.
  """

  key_bskh: jax.Array
  value_bskh: jax.Array

  def write(self, key_btkh, value_btkh, positions_bt) -> "KVCache":
    """Returns the cache with each row's new keys and values at their positions."""
    rows = jnp.arange(positions_bt.shape[0])[:, None]
    return KVCache(
      self.key_bskh.at[rows, positions_bt].set(key_btkh.astype(self.key_bskh.dtype)),
      self.value_bskh.at[rows, positions_bt].set(value_btkh.astype(self.value_bskh.dtype)),
    )
