"""Who may look at whom."""

import jax.numpy as jnp


def causal_mask(segments_bt, positions_bt):
  """Allows a query the keys of its own document up to its own position.

  Args:
    segments_bt: int32 document of each position; 0 is padding.
    positions_bt: int32 place within the document.
  Returns:
    mask_bts, bool, true where query t may see key s.
  """
  same = segments_bt[:, :, None] == segments_bt[:, None, :]
  return same & (positions_bt[:, :, None] >= positions_bt[:, None, :])


def cache_mask(positions_bt, cache_length: int):
  """Allows a query the cache slots up to its own position; slot number is position.

  Args:
    positions_bt: int32 position of each query.
    cache_length: slots s in the cache.
  Returns:
    mask_bts, bool.
  """
  return positions_bt[:, :, None] >= jnp.arange(cache_length)[None, None, :]
