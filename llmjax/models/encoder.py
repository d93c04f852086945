"""The encoder (BERT): bidirectional attention, masked-token head and pooler."""

import jax
import jax.numpy as jnp

from llmjax.core.dot import dot
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.models.text import TextModel
from llmjax.nn.mlp import PLAIN
from llmjax.nn.norm import Norm
from llmjax.nn.param import constant, fan_in, param


class Encoder(TextModel):
  """A bidirectional model of text; its cache is None.

  Source: Devlin et al. 2018, arXiv:1810.04805.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    super().__init__(keys[0], config)
    self.encoder = Stack(keys[1], config, config.causal)
    dims = config.dims | {"i": config.width}
    param(self, keys[2], "transform_id", dims, fan_in(dims, "i"), "table")
    param(self, keys[2], "transform_bias_d", dims, constant(0.0), "bias")
    self.transform_norm = Norm(keys[2], dims, config.norm)
    param(self, keys[3], "pooler_id", dims, fan_in(dims, "i"), "table")
    param(self, keys[3], "pooler_bias_d", dims, constant(0.0), "bias")

  def _transform(self, x_btd):
    x_btd = dot("bti,id->btd", x_btd, self.transform_id)
    x_btd = PLAIN["gelu"](x_btd + self.transform_bias_d.astype(x_btd.dtype))
    return self.transform_norm(x_btd)

  def pooler(self, x_bd):
    """BERT's vector of a text: tanh of a projection of the first token's."""
    return jnp.tanh(dot("bi,id->bd", x_bd, self.pooler_id) + self.pooler_bias_d)
