"""Generation: prompts of any lengths in one batch, a key/value cache, one compiled loop.

Prompts stand left-aligned; slot number is position. What padding writes beyond a prompt's end is
overwritten before any query may look at it, so a row's text does not depend on its neighbours.
"""

import dataclasses
import functools
import sys
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.model import Model
from llmjax.nn.position import PositionConfig
from llmjax.serve.decoding import begin, go_on
from llmjax.serve.detokenize import Detokenizer
from llmjax.serve.prompt import Prompts, bucket, check_room, encode_prompts, end_ids, pad_rows
from llmjax.serve.sample import Sampling

_STRIDE = 16  # tokens between two looks for a stop text


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model wrote after a prompt.

  Attributes:
    text: the new text alone: what prompt and new tokens read together, without the prompt's.
    ids: its tokens, without what ended it.
    finish: `stop` at an end token or a stop text, `length` at `max_tokens` or the end of the
      context.
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
  special: bool = False,
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
    special: special tokens that a prompt spells out are those tokens, not text.
  Returns:
    One completion a prompt, in order.
  Raises:
    UserError: a prompt leaves no room in the context, or the model does not take it: no tokenizer,
      no chat template, no images.
  """
  sampling = sampling or Sampling()
  rows, steps = _write(
    model, prompts, sampling, images, chat, special, _STRIDE if sampling.stop else 0
  )
  for _ in steps:
    pass
  return [row.completion() for row in rows]


def stream(
  model: Model,
  prompt: str,
  sampling: Sampling | None = None,
  images: Sequence = (),
  chat: bool = False,
  special: bool = False,
  stride: int = 1,
) -> Generator[str, None, Completion]:
  """Continues one prompt and hands the text out while it is written.

  Args:
    stride: tokens between two pieces; the others are those of `generate`, which writes the same.
  Returns:
    A generator of pieces, whole characters and never what a stop text may still take back. Together
    they are the text of the completion, which is the generator's return value.
  Raises:
    UserError: as `generate`, before the first piece is asked for.
  """
  rows, steps = _write(model, [prompt], sampling or Sampling(), [images], chat, special, stride)

  def pieces():
    for _ in steps:
      if piece := rows[0].text.piece():
        yield piece
    completion = rows[0].completion()
    if piece := rows[0].text.piece():
      yield piece
    return completion

  return pieces()


class _Row:
  """One prompt's text while it is written."""

  def __init__(self, tokenizer, prompt, sampling: Sampling, ends):
    self.text, self._ends, self._ended = Detokenizer(tokenizer, prompt, sampling.stop), ends, False

  def add(self, ids: list[int]):
    """Takes new ids, the last of which may end the row."""
    self._ended |= bool(ids) and ids[-1] in self._ends
    self.text.add(ids[:-1] if ids and self._ended else ids)

  def completion(self) -> Completion:
    self.text.finish()
    finish = "stop" if self._ended or self.text.stopped else "length"
    return Completion(self.text.text, self.text.ids, finish)


def _write(
  model: Model, prompts, sampling: Sampling, images, chat: bool, special: bool, stride: int
) -> tuple[list[_Row], Iterator[None]]:
  """Prepares prompts: their rows, and what writes on into them at every step."""
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer; generate from ids with generate_ids")
  encoded = encode_prompts(
    model.config, model.tokenizer, prompts, images, chat, special, model.processor
  )
  ends = end_ids(model.tokenizer, chat)
  rows = [_Row(model.tokenizer, ids, sampling, ends) for ids in encoded.rows]
  stopped_b = np.zeros(len(rows), bool)

  def steps():
    for new in _steps(model, encoded, sampling, ends, stride, stopped_b):
      for row, ids in zip(rows, new, strict=True):
        row.add(ids)
      stopped_b[:] = [row.text.stopped for row in rows]
      yield

  return rows, steps()


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
    UserError: a prompt is empty, or leaves no room in the context; or there are stop texts.
  """
  if sampling.stop:
    raise UserError("stop texts are found in text: generate_ids takes ends")
  if not isinstance(prompts, Prompts):
    prompts = Prompts(prompts)
  made = [[] for _ in prompts.rows]
  for new in _steps(model, prompts, sampling, ends):
    for row, ids in zip(made, new, strict=True):
      row += ids
  return made


def _steps(
  model: Model, prompts: Prompts, sampling: Sampling, ends, stride: int = 0, stopped_b=None
) -> Iterator[list[list[int]]]:
  """Writes on, `stride` tokens at a time (0: all at once): each row's new ids.

  `stopped_b` may be set between two steps: those rows write no more.
  """
  if not prompts.rows:
    return
  if not model.config.causal:
    raise UserError("this model's attention is bidirectional, so it writes no text")
  context = model.config.max_seq_len
  check_room(prompts, context)
  if model.config.moe.router == "expert_choice":
    _say_how_it_decodes(model.config.moe.experts)
  lengths = np.array([len(row) for row in prompts.rows], np.int32)
  room_b = np.minimum(sampling.max_tokens, context - lengths)
  _check_switch(model.config.position, lengths, room_b)
  most = int(room_b.max())
  batch = _batch(prompts, context)
  slots = min(bucket(batch.tokens_bt.shape[1] + most), context)
  knobs = {
    "temperature": jnp.float32(sampling.temperature),
    "top_p": jnp.float32(sampling.top_p),
    "min_p": jnp.float32(sampling.min_p),
    "ends": jnp.array(ends, jnp.int32),
    "key": jax.random.key(sampling.seed),
  }
  if sampling.repetition_penalty != 1:
    knobs["penalty"] = jnp.float32(sampling.repetition_penalty)
  state = begin(model.decoding, batch, lengths, knobs, top_k=sampling.top_k, slots=slots)
  stopped_b = np.zeros(len(lengths), bool) if stopped_b is None else stopped_b
  read_b, done = np.zeros(len(lengths), int), min(stride, 1)
  while True:
    done = min(done + stride, most) if stride and done else most
    state = go_on(
      model.decoding, state, lengths, knobs, jnp.int32(done), stopped_b, top_k=sampling.top_k
    )
    counts_b = np.minimum(np.asarray(state["counts"]), room_b)
    both = zip(np.asarray(state["out"]), read_b, counts_b, strict=True)
    yield [[int(i) for i in row[read:count]] for row, read, count in both]
    read_b = counts_b
    if done == most or np.all(np.asarray(state["ended"]) | stopped_b):
      return


def _check_switch(position: PositionConfig, lengths, room_b):
  """Refuses what would turn a longrope's short document into a long one while it is written.

  All its angles change there, so that what the cache holds would have to be made anew.
  """
  if position.kind != "rope" or position.scaling != "longrope":
    return
  last = position.original_context
  for length, new_tokens in zip(lengths, room_b, strict=True):
    if length <= last < length + new_tokens:
      raise UserError(
        f"a prompt of {length} tokens and {new_tokens} new ones pass position {last}, where "
        f"longrope changes all angles: ask for at most {last - length} new tokens"
      )


def _batch(prompts: Prompts, context: int) -> Batch:
  """Lays prompts out as a batch; a prefix model sees the whole of each at once.

  Segments tell routers of experts what is padding.
  """
  tokens_bt, inside_bt = pad_rows(prompts.rows, context)
  batch = Batch(
    tokens_bt, segments_bt=inside_bt.astype(np.int32), prefix_bt=inside_bt,
    patches_bsi=prompts.patches_bsi,
  )
  if prompts.sources is None:
    return batch
  source_bs, inside_bs = pad_rows(prompts.sources, context)
  segments_bs = inside_bs.astype(np.int32)
  return dataclasses.replace(batch, source_bs=source_bs, source_segments_bs=segments_bs)


@functools.cache
def _say_how_it_decodes(experts: int):
  """Says once that what is written is routed in another way than what was trained on."""
  print(
    "llmjax: warning: with model.moe.router=expert_choice experts choose among the tokens of a "
    f"prompt, but a token that is being written stands alone and goes to all {experts} of them",
    file=sys.stderr,
  )
