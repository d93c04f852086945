"""The encoder (BERT-type): every token sees every other; masked-token head and pooling."""

import jax
import jax.numpy as jnp

from llmjax.core.dot import dot
from llmjax.core.errors import UserError, nearest
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.models.text import TextModel
from llmjax.nn.mlp import PLAIN
from llmjax.nn.norm import Norm
from llmjax.nn.param import constant, fan_in, param

POOLINGS = ("mean", "first", "max", "pooler")


class Encoder(TextModel):
  """A bidirectional model of text; its cache is None.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  Source: Devlin et al. 2018, arXiv:1810.04805.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    super().__init__(keys[0], config)
    self.encoder = Stack(keys[1], config, config.causal)
    dims = config.dims | {"i": config.width}
    self.transform_id = param(keys[2], "transform_id", dims, fan_in(dims, "i"))
    self.transform_bias_d = param(keys[2], "transform_bias_d", dims, constant(0.0))
    self.transform_norm = Norm(keys[2], dims, config.norm)
    self.pooler_id = param(keys[3], "pooler_id", dims, fan_in(dims, "i"))
    self.pooler_bias_d = param(keys[3], "pooler_bias_d", dims, constant(0.0))

  def features(self, batch: Batch, key=None):
    """Runs the blocks: x_btd, what pooling and the head read. Arguments as of `hidden`."""
    return self._run(batch, None, key)[0]

  def _transform(self, x_btd):
    x_btd = dot("bti,id->btd", x_btd, self.transform_id)
    x_btd = PLAIN["gelu"](x_btd + self.transform_bias_d.astype(x_btd.dtype))
    return self.transform_norm(x_btd)

  def pool(self, x_btd, segments_bt=None, how: str = "mean"):
    """Makes one vector of a text.

    Args:
      x_btd: what `features` returns.
      segments_bt: int32; positions with 0 are left out. None: all count.
      how: mean or max over positions; first; pooler: tanh of a projection of the first.
    Returns:
      x_bd, fp32.
    Raises:
      UserError: an unknown pooling.
    """
    x_btd = x_btd.astype(jnp.float32)
    real_bt1 = jnp.ones(x_btd.shape[:2], bool) if segments_bt is None else segments_bt > 0
    real_bt1 = real_bt1[..., None]
    match how:
      case "mean":
        return jnp.sum(x_btd * real_bt1, axis=1) / jnp.maximum(jnp.sum(real_bt1, axis=1), 1)
      case "max":
        return jnp.max(jnp.where(real_bt1, x_btd, -jnp.inf), axis=1)
      case "first":
        return x_btd[:, 0]
      case "pooler":
        return jnp.tanh(dot("bi,id->bd", x_btd[:, 0], self.pooler_id) + self.pooler_bias_d)
    raise UserError(f"unknown pooling {how!r}; {nearest(how, POOLINGS)}")
