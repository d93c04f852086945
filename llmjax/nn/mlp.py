"""SwiGLU: a gated feed-forward layer."""

import jax
from flax import nnx

from llmjax.core.dot import dot
from llmjax.nn.param import fan_in, param
from llmjax.parallel.rules import shard


class SwiGlu(nnx.Module):
  """Computes (silu(x gate) · (x up)) down.

  Args:
    key: PRNG key of this module.
    dims: sizes of d and f.
    out_scale: factor on the down projection's initial standard deviation.

  Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
  """

  def __init__(self, key, dims, out_scale: float):
    self.gate_df = param(key, "gate_df", dims, fan_in(dims, "d"))
    self.up_df = param(key, "up_df", dims, fan_in(dims, "d"))
    self.down_fd = param(key, "down_fd", dims, fan_in(dims, "f", out_scale))

  def __call__(self, x_btd):
    gate_btf = shard(dot("btd,df->btf", x_btd, self.gate_df), "btf")
    up_btf = shard(dot("btd,df->btf", x_btd, self.up_df), "btf")
    return shard(dot("btf,fd->btd", jax.nn.silu(gate_btf) * up_btf, self.down_fd), "btd")
