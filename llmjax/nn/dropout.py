"""What training does to activations in passing: dropout, and names that remat policies know."""

import jax
import jax.numpy as jnp

# Activations that a remat policy can save by name: results of projections, and attention's own.
NAMES = ("query", "key", "value", "attention", "gate", "up")


def dropout(x, rate: float, key):
  """Zeroes each number with probability `rate` and scales the others by 1 / (1 - rate).

  Args:
    x: any float array.
    rate: in [0, 1).
    key: PRNG key of this place and step; None (evaluation) leaves `x` as it is.
  Returns:
    y, shape and dtype of `x`; its mean over keys is `x`.
  Source: Srivastava et al. 2014, JMLR 15, in its inverted form.
  """
  if key is None or rate == 0:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
