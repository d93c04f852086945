"""One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

import jax
from flax import nnx

from llmjax.models.config import ModelConfig
from llmjax.nn.attention import Attention
from llmjax.nn.mlp import SwiGlu
from llmjax.nn.norm import RmsNorm


class Block(nnx.Module):
  """A pre-norm decoder block.

  Args:
    key: PRNG key of this block.
    config: the architecture.
  """

  def __init__(self, key, config: ModelConfig):
    dims, eps = config.dims, config.norm_eps
    keys = jax.random.split(key, 4)
    out_scale = (2 * config.layers) ** -0.5  # keeps the residual stream's variance near one
    self.attention_norm = RmsNorm(keys[0], dims, eps)
    self.attention = Attention(keys[1], dims, out_scale)
    self.mlp_norm = RmsNorm(keys[2], dims, eps)
    self.mlp = SwiGlu(keys[3], dims, out_scale)

  def __call__(self, x_btd, rope, mask_bts, positions_bt, cache=None):
    """Runs the block; see `Attention.__call__` for the arguments and the result."""
    mixed, cache = self.attention(self.attention_norm(x_btd), rope, mask_bts, positions_bt, cache)
    x_btd = x_btd + mixed
    return x_btd + self.mlp(self.mlp_norm(x_btd)), cache
