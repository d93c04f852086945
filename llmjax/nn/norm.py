"""RMSNorm and LayerNorm, over one dimension or over several taken as one."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.nn.param import constant, param

KINDS = ("rms", "layer")
PLACES = ("pre", "post", "output", "sandwich")


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """The kind of norm, and its position in a block.

  Attributes:
    kind: rms, or layer (subtracts the mean as well).
    place: around a sublayer f: pre x + f(norm x), post norm(x + f x), output x + norm(f x),
      sandwich x + norm(f(norm x)).
    eps: added to the mean square or to the variance, > 0.
    bias: a bias after the scale; layer only.
    final: a norm after the last block; where place is post each block ends in one anyway.
  """

  kind: str = "rms"
  place: str = "pre"
  eps: float = 1e-5
  bias: bool = False
  final: bool = True

  def __post_init__(self):
    check_fields("model.norm", self, kind=KINDS, place=PLACES, eps="positive")
    if self.bias and self.kind == "rms":
      raise UserError("model.norm.bias needs model.norm.kind=layer; RMSNorm has no bias")


def rms_norm(x, scale, eps: float):
  """Computes x / √(mean(x²) + eps) · scale in fp32.

  Args:
    x: any float dtype; its last dimensions, as many as `scale` has, are normed as one.
    scale: fp32.
    eps: added to the mean square, > 0.
  Returns:
    y, shape and dtype of `x`.
  Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
  """
  axes = tuple(range(-scale.ndim, 0))
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + eps)
  return (wide * inverse * scale).astype(x.dtype)


def layer_norm(x, scale, bias, eps: float):
  """Computes (x - mean) / √(var + eps) · scale + bias in fp32; arguments as of `rms_norm`.

  Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
  """
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
  y = rms_norm(wide - mean, scale, eps)
  return (y if bias is None else y + bias).astype(x.dtype)


class Norm(nnx.Module):
  """A norm over the last dimensions of its argument, given by their letters."""

  def __init__(self, key, dims, config: NormConfig, letters: str = "d"):
    self.config = config
    self.letters = letters
    param(self, key, f"scale_{letters}", dims, constant(1.0), "scale")
    if config.bias:
      param(self, key, f"bias_{letters}", dims, constant(0.0), "bias")

  def __call__(self, x):
    scale = getattr(self, f"scale_{self.letters}")
    if self.config.kind == "rms":
      return _unfused_gradient(rms_norm(x, scale, self.config.eps))
    bias = getattr(self, f"bias_{self.letters}", None)
    return _unfused_gradient(layer_norm(x, scale, bias, self.config.eps))


@jax.custom_vjp
def _unfused_gradient(x):
  """x; a TPU's compiler would fuse a norm's backward pass into the product before and slow it."""
  return x


_unfused_gradient.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))
