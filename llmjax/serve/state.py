"""The one state of decoding: rows of a batch, each with its own length, sampling and cache.
`prefill` reads prompts, `step` writes a token of every row, `insert` and `free` let rows come and
go between two steps. What a row writes depends on its prompt and its key alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.nn.cache.dense import Cache, shard_keys
from llmjax.parallel.rules import shards, spec
from llmjax.serve.sample import RowSampling, draw, penalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Rows that are being written.

  Attributes:
    cache: keys and values of the first `length_b` tokens of every row.
    token_b: int32, the newest token of every row, at position `length_b`, not read yet.
    logprob_b: fp32, log-probability of `token_b` under the model: before penalty and temperature.
    length_b: int32.
    left_b: int32, tokens that may still be written; 0: the row has ended, or is free.
    seen_bv: bool, tokens that prompt and text hold, for the repetition penalty.
    sampling: how tokens of every row are drawn, and what ends it.
  """

  cache: Cache
  token_b: jax.Array
  logprob_b: jax.Array
  length_b: jax.Array
  left_b: jax.Array
  seen_bv: jax.Array
  sampling: RowSampling


def check_chunks(config: ModelConfig, has_images: bool = False):
  """Demands that a prompt may be read in chunks (an encoder reads its source at once all the same).

  Raises:
    UserError: the model's reading of a token depends on later ones or on the number of tokens that
      are read with it.
  """
  moe = config.moe
  reasons = {
    "every token of a prompt sees all others (model.attention.mask=prefix)":
      config.attention.mask == "prefix",
    "experts choose among all tokens of a prompt (model.moe.router=expert_choice)":
      moe.experts and moe.router == "expert_choice",
    "experts take a share of a prompt's tokens (model.moe.capacity)": moe.experts and moe.capacity,
    "longrope's angles depend on the prompt's length": config.position.scaling == "longrope",
    "images are read with the whole prompt": has_images,
  }
  if reason := next((reason for reason, holds in reasons.items() if holds), None):
    raise UserError(f"this prompt cannot be read in chunks: {reason}; leave prefill_chunk out")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def empty_state(
  model, rows: int, slots: int, ends: int = 8, source_tokens: int = 0, chunk: int = 1
) -> DecodeState:
  """Makes a state of free rows, to insert prefilled ones into.

  Args:
    model: with unstacked layers (`Model.decoding`).
    rows: how many at least; the mesh in scope divides what comes back.
    slots: positions of a row.
    ends: most end tokens of a row.
    source_tokens: longest source of an encoder_decoder.
    chunk: most tokens of a row that are read at a time.
  """
  rows = _padded(rows)
  zeros = jnp.zeros((rows, 1), jnp.int32)
  source_bs = jnp.zeros((rows, source_tokens), jnp.int32) if source_tokens else None
  batch = Batch(zeros, source_bs=source_bs, source_segments_bs=source_bs)
  zero_b, one_b, none_b = jnp.zeros(rows), jnp.ones(rows), jnp.zeros(rows, jnp.int32)
  key_b = jax.vmap(jax.random.key)(none_b.astype(jnp.uint32))
  ends_bn = jnp.full((rows, ends), -1, jnp.int32)
  sampling = RowSampling(zero_b, none_b, one_b, zero_b, one_b, key_b, ends_bn)
  cache = model.init_cache(batch, slots, chunk)
  seen_bv = jnp.zeros((rows, model.config.vocab_size), bool)
  return DecodeState(cache, none_b, zero_b, none_b, none_b, seen_bv, sampling)


@functools.partial(jax.jit, static_argnames=("slots", "chunk"))
def prefill(
  model, batch: Batch, sampling: RowSampling, left_b, slots: int, chunk: int | None = None
) -> DecodeState:
  """Reads prompts and draws the first token of every row.

  A batch that the mesh in scope does not divide is padded with rows that have ended.

  Args:
    model: with unstacked layers (`Model.decoding`).
    batch: prompts, left-aligned; `segments_bt` is 0 at padding, `prefix_bt` true at the prompt;
      sources or patches where the model reads them.
    sampling: of every row.
    left_b: int32, tokens that each row may write, at most `slots` less its prompt.
    slots: positions of a row in the cache.
    chunk: prompt tokens that are read at a time, at least 2; None: all. See `check_chunks`.
  """
  count, t = batch.tokens_bt.shape
  rows = _padded(count)
  if rows > count:
    row_b = jnp.minimum(jnp.arange(rows), count - 1)
    batch, sampling = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row_b], (batch, sampling))
    left_b = jnp.where(jnp.arange(rows) < count, left_b[row_b], 0)
  length_b = (batch.segments_bt > 0).sum(axis=1)
  chunk = t if chunk is None else min(chunk, t)
  if chunk < 2 < t or t > slots:
    raise UserError(f"prompts of {t} tokens in chunks of {chunk} do not fit into {slots} slots")
  cache = model.init_cache(batch, slots, chunk)
  if chunk == t:
    x_btd, cache, _ = model.hidden(batch, cache)
    last_bd = x_btd[jnp.arange(rows), length_b - 1]
  else:
    last_bd, cache = _read_chunks(model, batch, cache, length_b, chunk)
  cache = cache.resize(jax.eval_shape(lambda: model.init_cache(batch, slots, 1)))
  logits_bv = model.logits(last_bd[:, None])[:, 0]
  seen_bv = jnp.zeros(logits_bv.shape, bool)
  seen_bv = seen_bv.at[jnp.arange(rows)[:, None], batch.tokens_bt].max(batch.segments_bt > 0)
  none_b = jnp.zeros(rows, jnp.int32)
  state = DecodeState(cache, none_b, none_b * 0.0, length_b - 1, left_b, seen_bv, sampling)
  return _draw(state, logits_bv)


def _read_chunks(model, batch: Batch, cache: Cache, length_b, chunk: int):
  """Reads prompts `chunk` tokens at a time: (the stream at each prompt's last token, cache)."""
  rows, t = batch.tokens_bt.shape
  padding = ((0, 0), (0, -t % chunk))
  split = lambda a: jnp.pad(a, padding).reshape(rows, -1, chunk).swapaxes(0, 1)  # noqa: E731
  tokens, segments = split(batch.tokens_bt), split(batch.segments_bt)

  def read(carry, piece):
    last_bd, cache = carry
    tokens_bt, segments_bt, start = piece
    positions_bt = jnp.minimum(start + jnp.arange(chunk), t - 1) + jnp.zeros_like(tokens_bt)
    piece = Batch(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt)
    x_btd, cache, _ = model.hidden(piece, cache)
    at_b = length_b - 1 - start
    x_bd = x_btd[jnp.arange(rows), jnp.clip(at_b, 0, chunk - 1)]
    return (jnp.where(((at_b >= 0) & (at_b < chunk))[:, None], x_bd, last_bd), cache), None

  zero_bd = jnp.zeros((rows, model.config.width), jnp.dtype(model.config.dtype))
  starts = chunk * jnp.arange(len(tokens))
  return jax.lax.scan(read, (zero_bd, cache), (tokens, segments, starts))[0]


def step(model, state: DecodeState):
  """Reads the newest token of every row and draws the next.

  A row that has ended reads its last token again, which leaves its cache as it was.

  Returns:
    (state, tokens_b, logprobs_b); -1 and 0 of rows that had ended.
  """
  batch = Batch(state.token_b[:, None], positions_bt=state.length_b[:, None])
  x_btd, cache, _ = model.hidden(batch, state.cache)
  active_b = state.left_b > 0
  state = _draw(dataclasses.replace(state, cache=cache), model.logits(x_btd)[:, 0])
  return state, jnp.where(active_b, state.token_b, -1), jnp.where(active_b, state.logprob_b, 0)


def _draw(state: DecodeState, logits_bv) -> DecodeState:
  """Gives every row that has not ended one more token."""
  sampling, active_b = state.sampling, state.left_b > 0
  length_b = state.length_b + active_b
  scores_bv = jax.lax.cond(
    jnp.any(sampling.penalty_b != 1),
    lambda: penalize(logits_bv, state.seen_bv, sampling.penalty_b),
    lambda: logits_bv,
  )
  token_b = jnp.where(active_b, draw(scores_bv, sampling, length_b), state.token_b)
  chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
  logprob_b = chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)
  ended_b = jnp.any(token_b[:, None] == sampling.ends_bn, axis=1)
  ended_b |= length_b + 1 >= state.cache.slots
  state = dataclasses.replace(
    state,
    token_b=token_b,
    logprob_b=jnp.where(active_b, logprob_b, state.logprob_b),
    length_b=length_b,
    left_b=jnp.where(active_b & ~ended_b, state.left_b - 1, 0),
    seen_bv=jax.vmap(lambda seen_v, token: seen_v.at[token].set(True))(state.seen_bv, token_b),
  )
  return _constrain(state)


@functools.partial(jax.jit, static_argnames="most", donate_argnames="state")
def run_steps(model, state: DecodeState, count, going_b, most: int):
  """Takes `count` steps, or fewer where all rows have ended before.

  Args:
    count: int32, at most `most`.
    going_b: bool; rows where it is false are ended first.
    most: static.
  Returns:
    (state, tokens_bt, logprobs_bt), as of `step`, `most` wide.
  """
  state = dataclasses.replace(state, left_b=jnp.where(going_b, state.left_b, 0))
  shape = len(state.token_b), most
  empty = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)

  def carried(state, change):
    return dataclasses.replace(state, cache=change(state.cache))

  def unfinished(carry):
    done, state, _ = carry
    return (done < count) & jnp.any(state.left_b > 0)

  def body(carry):
    done, state, written = carry
    state, *new = step(model, carried(state, Cache.unsqueeze))
    put = lambda all_bt, new_b: jax.lax.dynamic_update_index_in_dim(all_bt, new_b, done, axis=1)  # noqa: E731
    return done + 1, carried(state, Cache.squeeze), tuple(map(put, written, new))

  start = jnp.int32(0), carried(state, Cache.squeeze), empty
  _, state, written = jax.lax.while_loop(unfinished, body, start)
  return _constrain(carried(state, Cache.unsqueeze)), *written


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, rows: DecodeState, at_b) -> DecodeState:
  """Puts prefilled rows in the place of others.

  Args:
    state: of b rows.
    rows: as `prefill` returns them, with no more slots, end tokens or source tokens than `state`.
    at_b: int32, for each of `rows` the number of the row it replaces; those beyond the last
      (padding) are dropped.
  Raises:
    UserError: they have more.
  """
  if rows.cache.slots > state.cache.slots:
    raise UserError(
      f"rows of {rows.cache.slots} slots do not fit into a state of {state.cache.slots}"
    )
  rows = dataclasses.replace(rows, cache=rows.cache.resize(state.cache))

  def put(path, old, new):
    fill = -1 if path[-1] == jax.tree_util.GetAttrKey("ends_bn") else 0
    missing = [(0, 0), *((0, a - b) for a, b in zip(old.shape[1:], new.shape[1:], strict=True))]
    if any(count < 0 for _, count in missing):
      raise UserError(f"rows of shape {new.shape} do not fit into a state of {old.shape}")
    new = jnp.pad(new, missing, constant_values=fill) if new.ndim > 1 else new
    return old.at[at_b].set(new, mode="drop")

  return _constrain(jax.tree_util.tree_map_with_path(put, state, rows))


@functools.partial(jax.jit, donate_argnames="state")
def free(state: DecodeState, at) -> DecodeState:
  """Ends row `at` and drops its keys."""
  is_row_b = jnp.arange(len(state.token_b)) == at
  state = truncate(state, jnp.where(is_row_b, 0, state.length_b), state.token_b)
  return dataclasses.replace(state, left_b=jnp.where(is_row_b, 0, state.left_b))


def truncate(state: DecodeState, length_b, token_b) -> DecodeState:
  """Drops the keys of all positions from `length_b` on, as of rejected draft tokens.

  Args:
    length_b: int32, at most what each row holds. A layer with a ring of window + k - 1 slots
      (`chunk` = k of its cache) still has the whole window after up to k keys are dropped.
    token_b: int32, the token that stands at position `length_b` of each row and is read next.
  """
  cache = state.cache.truncate(length_b)
  return _constrain(dataclasses.replace(state, cache=cache, length_b=length_b, token_b=token_b))


def _padded(rows: int) -> int:
  """The next number of rows that the mesh in scope divides."""
  return -(-rows // shards("b")) * shards("b")


def _constrain(state: DecodeState) -> DecodeState:
  """Constrains a state to the mesh in scope: its rows as a batch's, its heads over `tensor`."""
  if jax.sharding.get_abstract_mesh().empty:
    return state
  by_rows = lambda leaf: jax.lax.with_sharding_constraint(leaf, spec("b"))  # noqa: E731
  layers, source = shard_keys((state.cache.layers, state.cache.source))
  state = jax.tree.map(by_rows, state)
  return dataclasses.replace(
    state, cache=dataclasses.replace(state.cache, layers=layers, source=source)
  )
