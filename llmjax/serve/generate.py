"""Generation: prompts of any lengths in one batch, a key/value cache, one compiled loop.

Prompts stand left-aligned; slot number is position. What padding writes beyond a prompt's end is
overwritten before any query may look at it, so a row's text does not depend on its neighbours.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.errors import UserError
from llmjax.models.decoder import Decoder
from llmjax.models.model import Model
from llmjax.serve.sample import Sampling, draw
from llmjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model wrote after a prompt.

  Attributes:
    text: the new text alone.
    ids: its tokens, EOS left out.
    finish: `stop` at EOS, `length` at `max_tokens` or the end of the context.
  """

  text: str
  ids: list[int]
  finish: str


def generate(
  model: Model, prompts: Sequence[str], sampling: Sampling | None = None
) -> list[Completion]:
  """Continues prompts.

  Args:
    model: as `llmjax.load` returns it, with a tokenizer.
    prompts: texts; BOS is put before each.
    sampling: how tokens are drawn.
  Returns:
    One completion a prompt, in order.
  Raises:
    UserError: a prompt leaves no room in the context, or the model has no tokenizer.
  """
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer; generate from ids with generate_ids")
  tokenizer = model.tokenizer
  rows = encode_prompts(tokenizer, prompts, model.config.context)
  out = []
  for ids in generate_ids(model, rows, sampling or Sampling(), tokenizer.eos_id):
    stopped = bool(ids) and ids[-1] == tokenizer.eos_id
    ids = ids[:-1] if stopped else ids
    out.append(Completion(tokenizer.decode(ids), ids, "stop" if stopped else "length"))
  return out


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], context: int) -> list[list[int]]:
  """Encodes prompts, BOS first.

  Raises:
    UserError: a prompt leaves no room in the context.
  """
  rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
  _check_room(rows, context)
  return rows


def _check_room(rows: Sequence[Sequence[int]], context: int):
  for number, row in enumerate(rows):
    if not 0 < len(row) < context:
      raise UserError(
        f"prompt {number} has {len(row)} tokens (BOS counted); this model's context of {context} "
        f"takes from 1 to {context - 1}"
      )


def generate_ids(
  model: Model, rows: Sequence[Sequence[int]], sampling: Sampling, eos_id: int = -1
) -> list[list[int]]:
  """Continues rows of token ids; `generate` without a tokenizer.

  Args:
    model: the model.
    rows: prompts, each with at least one id.
    sampling: how tokens are drawn.
    eos_id: ends a row, and is kept as its last id; -1 ends none.
  Returns:
    The new ids of each row.
  Raises:
    UserError: a prompt is empty, or leaves no room in the context.
  """
  if not rows:
    return []
  context = model.config.context
  _check_room(rows, context)
  lengths = np.array([len(row) for row in rows], np.int32)
  new_tokens = min(sampling.max_tokens, context - int(lengths.min()))
  width = min(_bucket(int(lengths.max())), context)
  slots = min(_bucket(width + new_tokens), context)
  tokens_bt = np.zeros((len(rows), width), np.int32)
  for number, row in enumerate(rows):
    tokens_bt[number, : len(row)] = row
  out_bt, count_b = _run(
    model.parameters,
    tokens_bt,
    lengths,
    jax.random.key(sampling.seed),
    jnp.float32(sampling.temperature),
    jnp.float32(sampling.top_p),
    jnp.int32(new_tokens),
    jnp.int32(eos_id),
    top_k=sampling.top_k,
    slots=slots,
  )
  counts = np.minimum(np.asarray(count_b), context - lengths)
  return [[int(i) for i in row[:n]] for row, n in zip(np.asarray(out_bt), counts, strict=True)]


def _bucket(length: int) -> int:
  """Rounds up to a power of two, so that few shapes are ever compiled."""
  return 1 << max(4, (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("top_k", "slots"))
def _run(decoder: Decoder, tokens_bt, lengths, key, temperature, top_p, most, eos_id, top_k, slots):
  """Fills the cache with the prompts, then writes tokens until every row has ended."""
  rows = jnp.arange(tokens_bt.shape[0])
  logits_btv, cache = decoder(tokens_bt, cache=decoder.empty_cache(len(tokens_bt), slots))
  pick = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
  first = pick(jax.random.fold_in(key, 0), logits_btv[rows, lengths - 1])
  out_bt = jnp.zeros((len(tokens_bt), slots), jnp.int32).at[:, 0].set(first)

  def unfinished(carry):
    done, _, _, _, ended = carry
    return (done < most) & ~jnp.all(ended)

  def write_one(carry):
    done, cache, out_bt, counts, ended = carry
    # A row whose context is full goes on in its last slot; what it writes there is cut off later.
    positions = jnp.minimum(lengths + done - 1, slots - 1)[:, None]
    token = jax.lax.dynamic_index_in_dim(out_bt, done - 1, axis=1)
    logits_btv, cache = decoder(token, positions_bt=positions, cache=cache)
    drawn = pick(jax.random.fold_in(key, done), logits_btv[:, 0])
    out_bt = jax.lax.dynamic_update_index_in_dim(out_bt, drawn, done, axis=1)
    return done + 1, cache, out_bt, counts + ~ended, ended | (drawn == eos_id)

  counts = jnp.ones(len(tokens_bt), jnp.int32)
  carry = (jnp.int32(1), cache, out_bt, counts, first == eos_id)
  _, _, out_bt, counts, _ = jax.lax.while_loop(unfinished, write_one, carry)
  return out_bt, counts
