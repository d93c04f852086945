"""Dense feed-forward layers, plain or gated, and their activations."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.nn.param import constant, fan_in, param
from llmjax.nn.projection import project_in, project_out
from llmjax.nn.variant import FeedForward
from llmjax.parallel.rules import shard


def quick_gelu(x):
  """x · sigmoid(1.702 x), the GELU of CLIP (Hendrycks & Gimpel 2016, arXiv:1606.08415, sec. 2)."""
  return x * jax.nn.sigmoid(1.702 * x)


PLAIN = {
  "relu": jax.nn.relu,
  "relu2": lambda x: jax.nn.relu(x) ** 2,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": quick_gelu,
  "silu": jax.nn.silu,
}
GATED = {
  "swiglu": PLAIN["silu"],
  "geglu": PLAIN["gelu"],
  "geglu_tanh": PLAIN["gelu_tanh"],
  "reglu": PLAIN["relu"],
}
ACTIVATIONS = (*PLAIN, *GATED)


@dataclasses.dataclass(frozen=True)
class Dense(FeedForward):
  """The dense feed-forward layer, gated or plain as `model.activation` says."""

  def layer(self, key, model, out_scale: float) -> nnx.Module:
    return Mlp(key, model.dims, model.activation, model.mlp_bias, out_scale)


class Mlp(nnx.Module):
  """Computes act(x up) down, or (act(x gate) · (x up)) down, with biases or without.

  `out_scale` is a factor on the down projection's initial standard deviation.

  Source: gated: Shazeer 2020, arXiv:2002.05202, eq. 6; relu2: So et al. 2021, arXiv:2109.08668;
    GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415.
  """

  def __init__(self, key, dims, activation: str, bias: bool, out_scale: float):
    self.activation = activation
    self.inner = ("up", "gate") if activation in GATED else ("up",)
    for name in self.inner:
      param(self, key, f"{name}_df", dims, fan_in(dims, "d"))
    param(self, key, "down_fd", dims, fan_in(dims, "f", out_scale))
    for name in (*(f"{name}_bias_f" for name in self.inner), "down_bias_d") if bias else ():
      param(self, key, name, dims, constant(0.0), "bias")

  def __call__(self, x_btd):
    inner = project_in(self, x_btd, *(f"{name}_df" for name in self.inner))
    inner = map(checkpoint_name, (shard(y_btf, "btf") for y_btf in inner), self.inner)
    return project_out(self, activate(self.activation, *inner), "down_fd")


def activate(activation: str, up, gate=None):
  """Applies a plain activation to `up`, or a gated one to both."""
  return PLAIN[activation](up) if gate is None else gated(activation, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation, gate_btf, up_btf):
  """Computes act(gate) · up, again in the backward pass.

  Without the barriers a TPU's compiler recomputes it for every tile of a product that reads it.
  """
  return jax.lax.optimization_barrier(GATED[activation](gate_btf) * up_btf)


def _gated_backward(activation, residuals, grad_btf):
  multiply = lambda gate, up: GATED[activation](gate) * up  # noqa: E731
  return jax.lax.optimization_barrier(jax.vjp(multiply, *residuals)[1](grad_btf))


gated.defvjp(lambda activation, *both: (gated(activation, *both), both), _gated_backward)
