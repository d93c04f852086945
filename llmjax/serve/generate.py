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
from llmjax.data.batch import Batch
from llmjax.models.model import Model
from llmjax.serve.prompt import Prompts, bucket, check_room, encode_prompts, end_ids, lay_out
from llmjax.serve.sample import Sampling, draw


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model wrote after a prompt.

  Attributes:
    text: the new text alone.
    ids: its tokens, without what ended it.
    finish: `stop` at EOS or the end of a turn, `length` at `max_tokens` or the end of the context.
  """

  text: str
  ids: list[int]
  finish: str


def generate(
  model: Model,
  prompts: Sequence[str],
  sampling: Sampling | None = None,
  images=None,
  chat: bool = False,
) -> list[Completion]:
  """Continues prompts.

  Args:
    model: as `llmjax.load` returns it, with a tokenizer.
    prompts: texts; BOS is put before each, if the tokenizer is so made. An encoder_decoder reads
      them and begins anew.
    images: for each prompt a sequence of image files or open images; None: no images. They stand
      where the prompt spells the image token, or before it where it spells none.
    chat: each prompt is a user's message, put into the tokenizer's chat template; the assistant's
      answer comes back.
  Returns:
    One completion a prompt, in order.
  Raises:
    UserError: a prompt leaves no room in the context, or the model does not take it: no tokenizer,
      no chat template, no images.
  """
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer; generate from ids with generate_ids")
  tokenizer = model.tokenizer
  encoded = encode_prompts(model.config, tokenizer, prompts, images, chat)
  ends = end_ids(tokenizer, chat)
  out = []
  for ids in generate_ids(model, encoded, sampling or Sampling(), ends):
    stopped = bool(ids) and ids[-1] in ends
    ids = ids[:-1] if stopped else ids
    out.append(Completion(tokenizer.decode(ids), ids, "stop" if stopped else "length"))
  return out


def generate_ids(
  model: Model,
  prompts: Prompts | Sequence[Sequence[int]],
  sampling: Sampling,
  ends: Sequence[int] = (),
) -> list[list[int]]:
  """Continues rows of token ids; `generate` without a tokenizer.

  Args:
    model: a decoder or an encoder_decoder.
    prompts: rows, each with at least one id; as `Prompts` where there are sources or images.
    ends: each ends a row, and is kept as its last id.
  Returns:
    The new ids of each row.
  Raises:
    UserError: a prompt is empty, or leaves no room in the context.
  """
  if not isinstance(prompts, Prompts):
    prompts = Prompts(prompts)
  rows = prompts.rows
  if not rows:
    return []
  context = model.config.context
  check_room(prompts, context)
  lengths = np.array([len(row) for row in rows], np.int32)
  new_tokens = min(sampling.max_tokens, context - int(lengths.min()))
  batch = _batch(prompts, context)
  slots = min(bucket(batch.tokens_bt.shape[1] + new_tokens), context)
  out_bt, count_b = _run(
    model.decoding,
    batch,
    lengths,
    jax.random.key(sampling.seed),
    jnp.float32(sampling.temperature),
    jnp.float32(sampling.top_p),
    jnp.int32(new_tokens),
    jnp.array(ends, jnp.int32),
    top_k=sampling.top_k,
    slots=slots,
  )
  counts = np.minimum(np.asarray(count_b), context - lengths)
  return [[int(i) for i in row[:n]] for row, n in zip(np.asarray(out_bt), counts, strict=True)]


def _batch(prompts: Prompts, context: int) -> Batch:
  """Lays prompts out as a batch; a prefix model sees the whole of each at once."""
  tokens_bt, inside_bt = lay_out(prompts.rows, context)
  batch = Batch(tokens_bt, prefix_bt=inside_bt, patches_bsi=prompts.patches_bsi)
  if prompts.sources is None:
    return batch
  source_bs, inside_bs = lay_out(prompts.sources, context)
  segments_bs = inside_bs.astype(np.int32)
  return dataclasses.replace(batch, source_bs=source_bs, source_segments_bs=segments_bs)


def prefill(model, batch: Batch, lengths, slots: int):
  """Reads prompts into a new cache: (logits_bv after each row's last token, cache)."""
  x_btd, cache, _ = model.hidden(batch, model.start(batch, slots))
  last_btd = x_btd[jnp.arange(len(lengths)), lengths - 1][:, None]
  return model.logits(last_btd)[:, 0], cache


def decode(model, batch: Batch, cache):
  """Reads one more token of every row: (logits_bv after it, cache)."""
  x_btd, cache, _ = model.hidden(batch, cache)
  return model.logits(x_btd)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("top_k", "slots"))
def _run(model, batch, lengths, key, temperature, top_p, most, ends, top_k, slots):
  """Fills the cache with the prompts, then writes tokens until every row has ended."""
  pick = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
  logits_bv, cache = prefill(model, batch, lengths, slots)
  first = pick(jax.random.fold_in(key, 0), logits_bv)
  out_bt = jnp.zeros((len(lengths), slots), jnp.int32).at[:, 0].set(first)

  def at_end(drawn_b):
    return (drawn_b[:, None] == ends).any(axis=1)

  def unfinished(carry):
    done, _, _, _, ended = carry
    return (done < most) & ~jnp.all(ended)

  def write_one(carry):
    done, cache, out_bt, counts, ended = carry
    # A row whose context is full goes on in its last slot; what it writes there is cut off later.
    positions = jnp.minimum(lengths + done - 1, slots - 1)[:, None]
    token = jax.lax.dynamic_index_in_dim(out_bt, done - 1, axis=1)
    logits_bv, cache = decode(model, Batch(token, positions_bt=positions), cache.batched())
    drawn = pick(jax.random.fold_in(key, done), logits_bv)
    out_bt = jax.lax.dynamic_update_index_in_dim(out_bt, drawn, done, axis=1)
    return done + 1, cache.alone(), out_bt, counts + ~ended, ended | at_end(drawn)

  counts = jnp.ones(len(lengths), jnp.int32)
  carry = (jnp.int32(1), cache.alone(), out_bt, counts, at_end(first))
  _, _, out_bt, counts, _ = jax.lax.while_loop(unfinished, write_one, carry)
  return out_bt, counts
