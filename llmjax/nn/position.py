"""Rotary position embedding, half layout: channel i turns with channel i + h/2."""

import jax.numpy as jnp


def rope_angles(positions_bt, head_dim: int, theta: float):
  """Computes the rotation of every position: angle_i = position · theta^(-2i/h).

  Args:
    positions_bt: int32.
    head_dim: h, even.
    theta: base, dimensionless, > 0.
  Returns:
    (cos, sin), fp32 [b, t, h/2].
  Source: Su et al. 2021, arXiv:2104.09864, eq. 15.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  angles = positions_bt[..., None].astype(jnp.float32) * theta**-exponent
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_btnh, cos, sin):
  """Turns each pair (i, i + h/2) of a head by its position's angle, in fp32.

  Args:
    x_btnh: queries or keys.
    cos: [b, t, h/2] from `rope_angles`.
    sin: likewise.
  Returns:
    y_btnh, dtype of `x_btnh`.
  """
  low, high = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
  return turned.astype(x_btnh.dtype)
