"""Token, position and type embeddings before the first block, and the output head."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.choices import check_fields
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.core.take import take_rows
from llmjax.core.weight import is_sharded
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import constant, fan_in, normal, param
from llmjax.nn.position import SINUSOIDS, PositionConfig, sinusoids
from llmjax.parallel import rules


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
  """Options of the embedding and the output head.

  Attributes:
    scale: factor on token vectors.
    types: rows of a table of token types (BERT's segments); 0 for none.
    norm: a norm before the first block.
    head_bias: a bias on the logits.
    logit_scale: factor on the logits.
    logit_softcap: logits become softcap · tanh(logit / softcap); 0 leaves them.
    start_token: first id of an encoder_decoder's target (T5: 0); -1 means the tokenizer's BOS.
  """

  scale: float = 1.0
  types: int = 0
  norm: bool = False
  head_bias: bool = False
  logit_scale: float = 1.0
  logit_softcap: float = 0.0
  start_token: int = -1

  def __post_init__(self):
    check_fields("model.embed", self, types=0, logit_softcap=0, start_token=-1)
    if self.scale == 0 or self.logit_scale == 0:
      raise UserError("model.embed.scale and logit_scale must not be 0")


class Embed(nnx.Module):
  """Token vectors with learned or sinusoidal positions, and the head; one table if tied."""

  def __init__(
    self, key, dims, config: EmbedConfig, position: PositionConfig, norm: NormConfig, tied: bool
  ):
    self.config = config
    self.position = position
    self.tied = tied
    param(self, key, "token_vd", dims, normal(0.02), "table")
    if position.kind == "learned":
      param(self, key, "position_td", dims, normal(0.02), "table")
    if config.types:
      param(self, key, "type_id", dims | {"i": config.types}, normal(0.02), "table")
    if config.norm:
      self.norm = Norm(key, dims, norm)
    if not tied:
      param(self, key, "head_dv", dims, fan_in(dims, "d"), "table")
    if config.head_bias:
      param(self, key, "head_bias_v", dims, constant(0.0), "bias")

  def __call__(self, tokens_bt, positions_bt, dtype, types_bt=None, replace=None):
    """Embeds tokens: x_btd in `dtype`.

    Args:
      types_bt: int32 token types; None: all 0.
      replace: (bool [b, t], x_btd): vectors that replace tokens', such as an image's.
    """
    config = self.config
    x_btd = embedding_lookup(self.token_vd, tokens_bt, "v", dtype)
    if config.scale != 1:
      x_btd = x_btd * jnp.asarray(config.scale, dtype)
    if replace is not None:
      x_btd = jnp.where(replace[0][..., None], replace[1].astype(dtype), x_btd)
    if self.position.kind == "learned":
      x_btd += embedding_lookup(self.position_td, positions_bt, "t", dtype)
    elif self.position.kind in SINUSOIDS:
      x_btd += sinusoids(positions_bt, x_btd.shape[-1], self.position).astype(dtype)
    if config.types:
      types_bt = jnp.zeros_like(tokens_bt) if types_bt is None else types_bt
      x_btd += embedding_lookup(self.type_id, types_bt, "i", dtype)
    if config.norm:
      x_btd = self.norm(x_btd)
    return rules.shard_stream(x_btd)

  def only_head(self) -> "Embed":
    """A copy with the weights that `logits` reads, so that its gradient has no zeros for others."""
    head = copy.copy(self)
    for name in ("position_td", "type_id", "norm", *(() if self.tied else ("token_vd",))):
      if hasattr(head, name):
        delattr(head, name)
    return head

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    config = self.config
    eq, table = ("btd,vd->btv", "token_vd") if self.tied else ("btd,dv->btv", "head_dv")
    logits_btv = dot(eq, x_btd, getattr(self, table), jnp.float32)
    if config.logit_scale != 1:
      logits_btv *= config.logit_scale
    if config.head_bias:
      logits_btv += self.head_bias_v
    if config.logit_softcap:
      logits_btv = config.logit_softcap * jnp.tanh(logits_btv / config.logit_softcap)
    return rules.shard(logits_btv, "btv")


def embedding_lookup(table, ids_bt, letter: str, dtype):
  """Takes rows of a table by number: x_btd.

  Where the vocabulary is sharded over `tensor`, each device looks up the ids that it holds, and the
  results are summed (vocabulary-parallel embedding). Where d is sharded over `fsdp` too, ids are
  gathered and activations exchanged by all-to-all, so no table is gathered and no gradient reduced.

  Args:
    table: weight [v, d], [t, d] or [i, d] of any kind.
    letter: of the table's first dimension: `v`, `t` or `i`.
  Raises:
    UserError: the mesh does not divide the batch or the positions.
  Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3.
  """
  mesh = jax.sharding.get_abstract_mesh()
  take = functools.partial(take_rows, jnp.dtype(dtype).name)
  if mesh.empty or mesh.size == 1:
    return take(table, ids_bt)
  rules.check_divides(mesh, "tokens of a micro-batch", "bt", ids_bt.shape)
  axes = rules.WEIGHTS.get(letter)
  stream = rules.stream_spec(ids_bt.shape[1])
  weights = {f"table_{letter}d": table}
  width_sharded = rules.has_sharded(weights)

  def local(weights, ids_bt):
    shard_of = lambda leaf: leaf.array if is_sharded(leaf) else leaf  # noqa: E731
    (table_shard,) = jax.tree.map(shard_of, weights, is_leaf=is_sharded).values()
    if width_sharded:
      ids_bt = jax.lax.all_gather(ids_bt, "fsdp", axis=0, tiled=True)
    if axes is None:
      x_btd = take(table_shard, ids_bt)
    else:
      x_btd = _vocabulary_parallel(table_shard, ids_bt, axes, stream, take)
    if width_sharded:  # from some channels of all tokens to all channels of this device's tokens
      x_btd = jax.lax.all_to_all(x_btd, "fsdp", 0, 2, tiled=True)
    return x_btd

  in_specs = rules.weight_specs(weights), rules.spec("bt")
  out_specs = rules.spec("btd") if axes is None else stream
  return rules.on_each_device(local, in_specs, out_specs)(weights, ids_bt)


def _vocabulary_parallel(table_shard, ids_bt, axes, stream, take):
  local_bt = ids_bt - jax.lax.axis_index(axes) * table_shard.shape[0]
  is_local_bt = (local_bt >= 0) & (local_bt < table_shard.shape[0])
  x_btd = take(table_shard, jnp.where(is_local_bt, local_bt, 0))
  x_btd = jnp.where(is_local_bt[..., None], x_btd, 0)
  if axes in stream[1]:  # sequence parallelism
    return jax.lax.psum_scatter(x_btd, axes, scatter_dimension=1, tiled=True)
  return jax.lax.psum(x_btd, axes)
