"""Dropout, and the names of activations that remat policies can save."""

import jax
import jax.numpy as jnp

# Results of projections, and attention's own.
NAMES = ("query", "key", "value", "attention", "gate", "up")


def dropout(x, rate: float, key):
  """Zeroes each number with probability `rate` in [0, 1), and scales the others by 1 / (1 - rate).

  With `key` None (evaluation) `x` is returned as it is.

  Source: Srivastava et al. 2014, JMLR 15, in its inverted form.
  """
  if key is None or rate == 0:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
