"""Generation from texts or ids: prompts of any lengths in one batch, a loop over decoding steps."""

import collections
import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Generator, Iterator, Sequence

import jax
import numpy as np

from llmjax.core.errors import UserError, note
from llmjax.data.batch import Batch
from llmjax.models.inputs import as_list, bucket, is_chat, is_single, pad_rows
from llmjax.models.model import Model
from llmjax.nn.position import PositionConfig
from llmjax.serve.detokenize import Detokenizer
from llmjax.serve.prompt import Prompts, check_prompts, encode_prompts, end_ids
from llmjax.serve.sample import RowSampling, Sampling
from llmjax.serve.state import check_chunks, prefill, run_steps

_STRIDE = 16  # tokens between two searches for a stop text


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model wrote after a prompt.

  Attributes:
    text: the new text alone: what prompt and new tokens read together, without the prompt's.
    ids: its tokens, without what ended it.
    logprobs: log-probability of each under the model, before temperature, penalty and filters.
    finish: `stop` at an end token or a stop text, `length` at `max_tokens` or the end of the
      context.
  """

  text: str
  ids: list[int]
  logprobs: list[float]
  finish: str

  def __str__(self) -> str:
    return self.text

  @property
  def message(self) -> dict:
    """The completion as the assistant's message of a chat."""
    return {"role": "assistant", "content": self.text}


def generate(
  model: Model,
  prompts,
  sampling: Sampling | None = None,
  images=None,
  chat: bool = False,
  special: bool = False,
  prefill_chunk: int | None = None,
) -> Completion | list[Completion]:
  """Continues prompts.

  What a prompt is continued with depends on the model, the prompt, the sampling with its seed, and
  how many equal prompts stand before it in `prompts`: not on other prompts, their number, or the
  mesh (up to rounding). Equal prompts in one call are thus samples of one distribution, and the
  first of them is continued as it would be alone. The random numbers of the token at position p are
  those of the key fold_in(fold_in(fold_in(key(seed), crc32(prompt)), equal prompts before), p).

  Args:
    model: as `llmjax.load` returns it, with a tokenizer. Decoding runs on the mesh that its
      parameters lie on (`Model.mesh`), which need not divide the number of prompts.
    prompts: a text, token ids (taken as they are) or a list of chat messages, or a list of these.
      BOS is put before a text, if the tokenizer is so made; messages get an answer. An
      encoder_decoder reads prompts and begins anew.
    images: for each prompt a sequence of image files or open images; None: no images. They stand
      where the prompt spells the image token, or before it where it spells none.
    chat: each text is a user's message, put into the tokenizer's chat template; the assistant's
      answer comes back.
    special: special tokens that a prompt spells out are those tokens, not text.
    prefill_chunk: prompt tokens that are read at a time, at least 2 (bounds memory); None: all.
      An encoder reads its source at once all the same.
  Returns:
    The completion of one prompt, or a list of them, in order.
  Raises:
    UserError: a prompt leaves no room in the context, or the model does not take it: no tokenizer,
      no chat template, no images, or a model that must read a prompt at once.
  """
  sampling = sampling or Sampling()
  single, stride = is_single(prompts), _STRIDE if sampling.stop else 0
  if single and images is not None:
    images = [images]
  prompts = as_list(prompts)
  texts, steps = _write(model, prompts, sampling, images, chat, special, stride, prefill_chunk)
  for _ in steps:
    pass
  completions = [text.completion() for text in texts]
  return completions[0] if single else completions


def stream(
  model: Model,
  prompt,
  sampling: Sampling | None = None,
  images: Sequence = (),
  chat: bool = False,
  special: bool = False,
  stride: int = 1,
  prefill_chunk: int | None = None,
) -> Generator[str, None, Completion]:
  """Continues one prompt and hands the text out while it is written.

  Args:
    prompt: a text, token ids or a list of chat messages.
    stride: tokens between two pieces; the others are those of `generate`, which writes the same.
  Returns:
    A generator of pieces, whole characters and never what a stop text may still take back. Together
    they are the text of the completion, which is the generator's return value.
  Raises:
    UserError: as `generate`, before the first piece is asked for.
  """
  sampling = sampling or Sampling()
  if not is_single(prompt):
    raise UserError("stream takes one prompt; generate takes several")
  [text], steps = _write(
    model, [prompt], sampling, [images], chat, special, stride, prefill_chunk
  )

  def pieces():
    for _ in steps:
      if piece := text.detokenizer.piece():
        yield piece
    completion = text.completion()
    if piece := text.detokenizer.piece():
      yield piece
    return completion

  return pieces()


class _Text:
  """The text after one prompt, while it is written."""

  def __init__(self, tokenizer, prompt, sampling: Sampling, ends):
    self.detokenizer = Detokenizer(tokenizer, prompt, sampling.stop)
    self._ends, self._ended, self._logprobs = ends, False, []

  def add(self, ids: list[int], logprobs: list[float]):
    """Takes new ids, the last of which may end the text."""
    self._ended |= bool(ids) and ids[-1] in self._ends
    self._logprobs += logprobs
    self.detokenizer.add(ids[:-1] if ids and self._ended else ids)

  def completion(self) -> Completion:
    self.detokenizer.finish()
    text, ids, stopped = self.detokenizer.text, self.detokenizer.ids, self.detokenizer.stopped
    finish = "stop" if self._ended or stopped else "length"
    return Completion(text, ids, self._logprobs[: len(ids)], finish)


def _write(
  model: Model, prompts, sampling: Sampling, images, chat, special, stride: int, chunk
) -> tuple[list[_Text], Iterator[None]]:
  """Prepares prompts: their texts, and an iterator whose every step writes on into them."""
  if model.tokenizer is None:
    raise UserError("this model has no tokenizer; generate from ids with generate_ids")
  encoded = encode_prompts(
    model.config, model.tokenizer, prompts, images, chat, special, model.processor
  )
  ends = end_ids(model.tokenizer, chat or any(map(is_chat, prompts)))
  texts = [_Text(model.tokenizer, ids, sampling, ends) for ids in encoded.rows]
  going_b = np.ones(len(texts), bool)

  def steps():
    for new in _steps(model, encoded, sampling, ends, chunk, stride, going_b):
      for text, (ids, logprobs) in zip(texts, new, strict=True):
        text.add(ids, logprobs)
      going_b[:] = [not text.detokenizer.stopped for text in texts]
      yield

  return texts, steps()


def generate_ids(
  model: Model,
  prompts: Prompts | Sequence[Sequence[int]],
  sampling: Sampling,
  ends: Sequence[int] = (),
  prefill_chunk: int | None = None,
  logprobs: bool = False,
) -> list[list[int]] | list[tuple[list[int], list[float]]]:
  """Continues rows of token ids; `generate` without a tokenizer.

  Args:
    model: a decoder or an encoder_decoder.
    prompts: rows, each with at least one id; as `Prompts` where there are sources or images.
    ends: each ends a row, and is kept as its last id.
    prefill_chunk: as of `generate`.
    logprobs: whether the log-probability of every new id is returned too, as in `Completion`.
  Returns:
    The new ids of each row; with `logprobs` (ids, log-probabilities) of each.
  Raises:
    UserError: a prompt is empty, or leaves no room in the context; or there are stop texts.
  """
  if sampling.stop:
    raise UserError("stop texts are found in text: generate_ids takes ends")
  if not isinstance(prompts, Prompts):
    prompts = Prompts(prompts)
  written = [([], []) for _ in prompts.rows]
  for new in _steps(model, prompts, sampling, ends, prefill_chunk):
    for (ids, scores), (new_ids, new_scores) in zip(written, new, strict=True):
      ids += new_ids
      scores += new_scores
  return written if logprobs else [ids for ids, _ in written]


def _steps(
  model: Model, prompts: Prompts, sampling: Sampling, ends, chunk, stride: int = 0, going_b=None
) -> Iterator[list[tuple[list[int], list[float]]]]:
  """Writes on, `stride` tokens at a time (0: all at once): each row's new ids and logprobs.

  `going_b` may be changed between two steps: rows where it is false write no more.
  """
  if not prompts.rows:
    return
  _check(model, prompts, chunk)
  context, rows = model.config.max_seq_len, len(prompts.rows)
  lengths = np.array([len(row) for row in prompts.rows], np.int32)
  left_b = np.minimum(sampling.max_tokens, context - lengths).astype(np.int32)
  _check_switch(model.config.position, lengths, left_b)
  batch, left = _batch(prompts, context), int(left_b.max())
  slots = min(bucket(batch.tokens_bt.shape[1] + left), context)
  samplings = RowSampling.of([sampling] * rows, [ends] * rows, _salts(model, prompts))
  weights = model.decoding
  with _on(model.mesh):
    state = prefill(weights, batch, samplings, left_b, slots=slots, chunk=chunk)
  tokens_bt, logprobs_bt = np.array([state.token_b]).T, np.array([state.logprob_b]).T
  padded_b = np.zeros(len(state.token_b), bool)
  padded_b[:rows] = True
  left -= 1
  width = bucket(stride or left, 1)
  while True:
    written = zip(np.asarray(tokens_bt)[:rows], np.asarray(logprobs_bt)[:rows], strict=True)
    yield [(ids[ids >= 0].tolist(), logs[ids >= 0].tolist()) for ids, logs in written]
    if going_b is not None:
      padded_b[:rows] = going_b
    if not left or not np.any(np.asarray(state.left_b)[padded_b] > 0):
      return
    count = min(stride or left, left)
    with _on(model.mesh):
      state, tokens_bt, logprobs_bt = run_steps(
        weights, state, np.int32(count), padded_b, most=width
      )
    left -= count


def _on(mesh):
  """Puts a mesh in scope; None leaves the scope as it is."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _check(model: Model, prompts: Prompts, chunk: int | None):
  """Refuses what a model cannot continue, and says how a router that looks ahead decodes."""
  config = model.config
  if not config.causal:
    raise UserError("this model's attention is bidirectional, so it writes no text")
  check_prompts(prompts, config.max_seq_len)
  if chunk is not None:
    if chunk < 2:
      raise UserError(f"prefill_chunk {chunk} is less than 2")
    check_chunks(config, prompts.patches_bsi is not None)
  if config.moe.router == "expert_choice":
    _say_how_it_decodes(config.moe.experts)


@functools.cache
def _say_how_it_decodes(experts: int):
  """Says once that new tokens are routed in another way than those of training."""
  note(
    "with model.moe.router=expert_choice experts choose among the tokens of a prompt, but a token "
    f"that is being written stands alone and goes to all {experts} of them"
  )


def _salts(model: Model, prompts: Prompts) -> list[tuple[int, int]]:
  """What each row's key depends on besides its seed: (hash of the prompt, equal ones before it)."""
  seen, salts = collections.Counter(), []
  for number, row in enumerate(prompts.rows):
    hashed = zlib.crc32(np.array(row, np.int32).tobytes())
    if prompts.sources is not None:
      hashed = zlib.crc32(np.array(prompts.sources[number], np.int32).tobytes(), hashed)
    if prompts.patches_bsi is not None:
      patches = list(row).count(model.config.vision.image_token)
      hashed = zlib.crc32(prompts.patches_bsi[number, :patches].tobytes(), hashed)
    salts.append((hashed, seen[hashed]))
    seen[hashed] += 1
  return salts


def _check_switch(position: PositionConfig, lengths, left_b):
  """Refuses what would turn a longrope's short document into a long one while it is written.

  All angles change there, so that all keys in the cache would have to be computed anew.
  """
  if position.kind != "rope" or position.scaling != "longrope":
    return
  last = position.original_context
  for length, new_tokens in zip(lengths, left_b, strict=True):
    if length <= last < length + new_tokens:
      raise UserError(
        f"a prompt of {length} tokens and {new_tokens} new ones pass position {last}, where "
        f"longrope changes all angles: ask for at most {last - length} new tokens"
      )


def _batch(prompts: Prompts, context: int) -> Batch:
  """The prompts as a batch, all of them prefix; segments say what is padding."""
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
