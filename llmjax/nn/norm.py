"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.nn.param import constant, param


def rms_norm(x_btd, scale_d, eps: float):
  """Divides by the root mean square and scales: x / √(mean(x²) + eps) · scale, in fp32.

  Args:
    x_btd: any float dtype.
    scale_d: fp32.
    eps: added to the mean square, > 0.
  Returns:
    y_btd, dtype of `x_btd`.
  Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
  """
  x = x_btd.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
  return (x * inverse * scale_d).astype(x_btd.dtype)


class RmsNorm(nnx.Module):
  """RMSNorm with its scale, initialized to one."""

  def __init__(self, key, dims, eps: float):
    self.scale_d = param(key, "scale_d", dims, constant(1.0))
    self.eps = eps

  def __call__(self, x_btd):
    return rms_norm(x_btd, self.scale_d, self.eps)
