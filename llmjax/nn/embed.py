"""Token embedding and output head."""

import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import dot
from llmjax.nn.param import fan_in, normal, param
from llmjax.parallel.rules import shard


class Embed(nnx.Module):
  """Token vectors, and the head that scores every token; one matrix for both when tied.

  Args:
    key: PRNG key of this module.
    dims: sizes of v and d.
    tied: the head reads the embedding itself.
  """

  def __init__(self, key, dims, tied: bool):
    self.tied = tied
    self.token_vd = param(key, "token_vd", dims, normal(0.02))
    if not tied:
      self.head_dv = param(key, "head_dv", dims, fan_in(dims, "d"))

  def __call__(self, tokens_bt, dtype):
    """Looks tokens up: x_btd in `dtype`."""
    return shard(jnp.take(self.token_vd, tokens_bt, axis=0).astype(dtype), "btd")

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    if self.tied:
      logits_btv = dot("btd,vd->btv", x_btd, self.token_vd, jnp.float32)
    else:
      logits_btv = dot("btd,dv->btv", x_btd, self.head_dv, jnp.float32)
    return shard(logits_btv, "btv")
