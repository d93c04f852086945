"""Token embedding, with what is added to it before the first block, and the output head."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.choices import check_least
from llmjax.core.dot import dot
from llmjax.core.errors import UserError
from llmjax.core.take import take_rows
from llmjax.core.weight import without_sharding
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import constant, fan_in, normal, param
from llmjax.nn.position import SINUSOIDS, PositionConfig, sinusoids
from llmjax.parallel.rules import (
  ACTIVATIONS,
  WEIGHTS,
  check_divides,
  has_sharded,
  inside,
  shard,
  shard_stream,
  spec,
  stream_spec,
  weight_specs,
)


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
  """What surrounds the token table.

  Attributes:
    scale: factor on token vectors.
    types: rows of a table of token types (BERT's segments); 0 for none.
    norm: a norm before the first block.
    head_bias: a bias on the logits.
    logit_scale: factor on the logits.
    logit_softcap: logits become softcap · tanh(logit / softcap); 0 leaves them.
    start_token: id that what an encoder_decoder writes begins with (T5: 0); -1 means the
      tokenizer's BOS.
  """

  scale: float = 1.0
  types: int = 0
  norm: bool = False
  head_bias: bool = False
  logit_scale: float = 1.0
  logit_softcap: float = 0.0
  start_token: int = -1

  def __post_init__(self):
    check_least("model.embed", self, types=0, logit_softcap=0, start_token=-1)
    if self.scale == 0 or self.logit_scale == 0:
      raise UserError("model.embed.scale and logit_scale must not be 0")


class Embed(nnx.Module):
  """Token vectors, and the head that scores every token; one matrix for both when tied.

  Args:
    key: PRNG key of this module.
    dims: sizes of v and d, of t (rows of a learned position table) and i (token types).
    config: what surrounds the table.
    position: learned and sinusoidal positions are added here.
    norm: kind of the embedding norm.
    tied: the head reads the embedding itself.
  """

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
    """Looks tokens up and adds what the config says.

    Args:
      tokens_bt: int32 ids.
      positions_bt: int32 places within the document.
      dtype: of the result.
      types_bt: int32 token types; all 0 by default.
      replace: (bool [b, t], x_btd): vectors that stand in for tokens, such as an image's.
    Returns:
      x_btd in `dtype`.
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
    return shard_stream(x_btd)

  def only_head(self) -> "Embed":
    """A copy of what `logits` reads alone, whose gradient then has no zeros for the rest."""
    head = copy.copy(self)
    kept = ("token_vd",) if self.tied else ("head_dv",)
    for name in ("token_vd", "position_td", "type_id", "norm"):
      if hasattr(head, name) and name not in kept:
        delattr(head, name)
    return head

  def logits(self, x_btd):
    """Scores every token: logits_btv, fp32."""
    config = self.config
    if self.tied:
      logits_btv = dot("btd,vd->btv", x_btd, self.token_vd, jnp.float32)
    else:
      logits_btv = dot("btd,dv->btv", x_btd, self.head_dv, jnp.float32)
    if config.logit_scale != 1:
      logits_btv *= config.logit_scale
    if config.head_bias:
      logits_btv += self.head_bias_v
    if config.logit_softcap:
      logits_btv = config.logit_softcap * jnp.tanh(logits_btv / config.logit_softcap)
    return shard(logits_btv, "btv")


def embedding_lookup(table, ids_bt, letter: str, dtype):
  """Takes rows of a table by number: x_btd.

  The table's rows are sharded over `tensor`: each device looks up the ids that it holds, and the
  results are summed (vocabulary-parallel embedding). Where d is sharded over `fsdp` too, ids are
  gathered and activations exchanged by all-to-all, so no table is gathered and no gradient reduced.

  Args:
    table: weight [rows, d] of any kind.
    ids_bt: int32 row numbers.
    letter: of the rows: `v`, `t` or `i`.
    dtype: of the result.
  Raises:
    UserError: the mesh does not divide rows or positions.
  Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3.
  """
  mesh = jax.sharding.get_abstract_mesh()
  take = functools.partial(take_rows, jnp.dtype(dtype).name)
  if mesh.empty or mesh.size == 1:
    return take(table, ids_bt)
  check_divides(mesh, "tokens of a micro-batch", "bt", ids_bt.shape, ACTIVATIONS)
  axes = WEIGHTS.get(letter)
  stream = stream_spec(ids_bt.shape[1])
  weights = {f"table_{letter}d": table}
  width_sharded = has_sharded(weights)

  def local(weights, ids_bt):
    (shard,) = without_sharding(weights).values()
    x_btd = _own_rows(shard, ids_bt, axes, stream, take, all_ids=width_sharded)
    if width_sharded:  # each device took its channels of all tokens; now all channels of its own
      x_btd = jax.lax.all_to_all(x_btd, "fsdp", 0, 2, tiled=True)
    return x_btd

  return jax.shard_map(
    local,
    in_specs=(weight_specs(weights), spec("bt", ACTIVATIONS)),
    out_specs=spec("btd", ACTIVATIONS) if axes is None else stream,
    axis_names={axis for axis in mesh.axis_names if not inside(axis)},
    check_vma=False,
  )(weights, ids_bt)


def _own_rows(rows, ids_bt, axes, stream, take, all_ids: bool):
  """Looks up the ids whose rows this device holds, and sums over the devices of `axes`."""
  if all_ids:
    ids_bt = jax.lax.all_gather(ids_bt, "fsdp", axis=0, tiled=True)
  if axes is None:
    return take(rows, ids_bt)
  own_bt = ids_bt - jax.lax.axis_index(axes) * rows.shape[0]
  here_bt = (own_bt >= 0) & (own_bt < rows.shape[0])
  x_btd = take(rows, jnp.where(here_bt, own_bt, 0))
  x_btd = jnp.where(here_bt[..., None], x_btd, 0)
  if axes in stream[1]:  # each device keeps its positions of the sum
    return jax.lax.psum_scatter(x_btd, axes, scatter_dimension=1, tiled=True)
  return jax.lax.psum(x_btd, axes)
