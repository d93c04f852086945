"""The encoder (BERT-type): every token sees every other; masked-token head and pooling."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import dot
from llmjax.core.errors import UserError, nearest
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.decoder import default_positions
from llmjax.models.stack import Stack
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import Embed
from llmjax.nn.mlp import PLAIN
from llmjax.nn.norm import Norm
from llmjax.nn.param import constant, fan_in, param

POOLINGS = ("mean", "first", "max", "pooler")


class Encoder(nnx.Module):
  """A bidirectional model of text.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  Source: Devlin et al. 2018, arXiv:1810.04805.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 4)
    dims = config.dims | {"i": config.width}
    self.config = config
    self.embed = Embed(
      keys[0], dims, config.embed, config.position, config.norm, config.tie_embeddings
    )
    self.encoder = Stack(keys[1], config, config.causal)
    self.transform_id = param(keys[2], "transform_id", dims, fan_in(dims, "i"))
    self.transform_bias_d = param(keys[2], "transform_bias_d", dims, constant(0.0))
    self.transform_norm = Norm(keys[2], dims, config.norm)
    self.pooler_id = param(keys[3], "pooler_id", dims, fan_in(dims, "i"))
    self.pooler_bias_d = param(keys[3], "pooler_bias_d", dims, constant(0.0))

  def __call__(self, tokens_bt, segments_bt=None, positions_bt=None):
    """Scores what each token was: (logits_btv in fp32, None); see `hidden`."""
    x_btd, *_ = self.hidden(Batch(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt))
    return self.logits(x_btd), None

  def features(self, batch: Batch, key=None):
    """Runs the blocks: x_btd, what pooling and the head read.

    Args:
      batch: tokens, and whatever else is known of them: segments, positions, types, prefix.
      key: PRNG key of dropout; None drops nothing.
    """
    return self._features(batch, key)[0]

  def _features(self, batch: Batch, key):
    x_btd = self.enter(batch, key)
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    return self.encoder(
      x_btd, positions_bt, batch.segments_bt, self._prefix(batch), key=_keys(key)[1],
      tokens_bt=batch.tokens_bt,
    )

  def enter(self, batch: Batch, key=None):
    """Runs everything before the blocks: x_btd. Arguments as of `features`."""
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    dtype = jnp.dtype(self.config.dtype)
    x_btd = self.embed(batch.tokens_bt, positions_bt, dtype, batch.types_bt)
    return dropout(x_btd, self.config.dropout, _keys(key)[0])

  def shared(self, batch: Batch, key=None):
    """Makes what all blocks are given alike. Arguments as of `features`."""
    positions_bt = default_positions(batch.tokens_bt, batch.positions_bt)
    return self.encoder.shared(
      positions_bt, batch.segments_bt, self._prefix(batch), key=_keys(key)[1],
      tokens_bt=batch.tokens_bt,
    )

  def leave(self, x_btd):
    """Runs everything between the blocks and the head: x_btd."""
    return self._transform(self.encoder.leave(x_btd))

  def _prefix(self, batch: Batch):
    return batch.prefix_bt if self.config.attention.mask == "prefix" else None

  def hidden(self, batch: Batch, cache: None = None, key=None):
    """Runs everything before the head: (x_btd, None, what routers did or None)."""
    x_btd, _, routing = self._features(batch, key)
    return self._transform(x_btd), None, routing

  def _transform(self, x_btd):
    x_btd = dot("bti,id->btd", x_btd, self.transform_id)
    x_btd = PLAIN["gelu"](x_btd + self.transform_bias_d.astype(x_btd.dtype))
    return self.transform_norm(x_btd)

  @property
  def head(self) -> Embed:
    """The module whose `logits(x_btd)` scores every token."""
    return self.embed

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    return self.head.logits(x_btd)

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


def _keys(key) -> list:
  """Keys of embedding and blocks."""
  return [None, None] if key is None else list(jax.random.split(key))
