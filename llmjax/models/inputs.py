"""What callers give a model, as rows of token ids: text, ids or chat messages, one or many."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from llmjax.core.errors import UserError
from llmjax.text.chat import encode_chat
from llmjax.text.tokenizer import Tokenizer, framed


@dataclasses.dataclass(frozen=True)
class Rows:
  """Inputs as ids.

  Attributes:
    ids: one list a row.
    single: one input was given, not a sequence of them.
    texts: some row was text, so that its length is arbitrary.
  """

  ids: list[list[int]]
  single: bool
  texts: bool

  def pad(self, context: int):
    """Pads on the right: (ids int32 [b, t], bool, true where a row has an id)."""
    check_lengths("input", self.ids, context, context)
    return pad_rows(self.ids, context if self.texts else max(map(len, self.ids)))

  def unpad(self, array, axis: int, row_axis: int = 0):
    """Cuts the padding off an array of the model, drops the row axis of a single input.

    What is left of it, after the end of shorter rows, becomes NaN.

    Args:
      array: floats.
      axis: of positions.
      row_axis: of rows, before `axis`.
    """
    lengths = np.array([len(row) for row in self.ids])
    array = jax.lax.slice_in_dim(array, 0, int(lengths.max()), axis=axis)
    if self.single:
      return array.squeeze(row_axis)
    if lengths.min() == lengths.max():
      return array
    shape = [1] * array.ndim
    shape[row_axis], shape[axis] = len(lengths), int(lengths.max())
    inside = (np.arange(lengths.max()) < lengths[:, None]).reshape(shape)
    return jax.numpy.where(inside, array, np.nan)


def is_single(inputs) -> bool:
  """Whether `inputs` is one text, one row of ids or one chat, not a sequence of them.

  Raises:
    UserError: it is none of these.
  """
  if isinstance(inputs, str):
    return True
  if isinstance(inputs, (np.ndarray, jax.Array)):
    if inputs.ndim not in (1, 2):
      raise UserError(f"an array of token ids has 1 or 2 axes, not {inputs.ndim}")
    return inputs.ndim == 1
  if not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
    raise UserError(
      "inputs are text, token ids or a list of chat messages, or a list of these, not "
      f"{type(inputs).__name__}"
    )
  return bool(len(inputs)) and (_is_id(inputs[0]) or isinstance(inputs[0], Mapping))


def as_list(inputs) -> list:
  """A list of inputs; of a single one, that one alone."""
  return [inputs] if is_single(inputs) else list(inputs)


def is_chat(one) -> bool:
  """Whether one input is a list of chat messages."""
  return not isinstance(one, str) and len(one) > 0 and isinstance(one[0], Mapping)


def encode_input(
  one, tokenizer: Tokenizer | None, kind: str, special: bool = False, answer: bool = False
) -> list[int]:
  """The ids of one input.

  Args:
    one: text, which gets what the tokenizer puts around a text; ids, taken as they are; or chat
      messages with `role` and `content`, which go through the tokenizer's chat template.
    tokenizer: None where there are only ids.
    kind: of the model.
    special: special tokens that a text spells out become their ids.
    answer: messages are followed by what begins the assistant's answer.
  Raises:
    UserError: neither of these, no tokenizer or no chat template.
  """
  if isinstance(one, str):
    return framed(tokenizer, kind, _needed(tokenizer).encode(one, special))
  if not is_single(one) and len(one):
    raise UserError("an input of a list is text, token ids or chat messages, not another list")
  if is_chat(one):
    return encode_chat(_needed(tokenizer), one, add_generation_prompt=answer)
  if not all(map(_is_id, one)):
    raise UserError(f"token ids are integers, not {next(i for i in one if not _is_id(i))!r}")
  return [int(i) for i in one]


def encode_inputs(inputs, tokenizer: Tokenizer | None, kind: str) -> Rows:
  """The ids of one input or a sequence of them; see `encode_input`.

  Raises:
    UserError: as `encode_input`, or there is no input.
  """
  given = as_list(inputs)
  if not given:
    raise UserError("there is no input: give text, token ids or chat messages")
  ids = [encode_input(one, tokenizer, kind) for one in given]
  return Rows(ids, is_single(inputs), any(isinstance(one, str) for one in given))


def check_lengths(name: str, rows: Sequence[Sequence[int]], most: int, context: int):
  """Raises a `UserError` where a row has not 1 to `most` ids; `name` is what it calls the row."""
  for number, row in enumerate(rows):
    if not 0 < len(row) <= most:
      raise UserError(
        f"{name} {number} has {len(row)} tokens (special ones counted); this model's context of "
        f"{context} takes from 1 to {most}"
      )


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int):
  """Raises a `UserError` where an id is not in the vocabulary."""
  low, high = min(map(min, rows)), max(map(max, rows))
  if low < 0 or high >= vocab_size:
    raise UserError(
      f"token ids run from {low} to {high}, the vocabulary from 0 to {vocab_size - 1}"
    )


def pad_rows(rows: Sequence[Sequence[int]], context: int, least: int = 16):
  """Pads rows on the right: (ids int32 [b, t], bool, true where a row has an id).

  Their width is a `bucket` of at least `least`, at most the context.
  """
  lengths = np.array([len(row) for row in rows])
  is_token_bt = np.arange(min(bucket(int(lengths.max()), least), context)) < lengths[:, None]
  ids_bt = np.zeros(is_token_bt.shape, np.int32)
  ids_bt[is_token_bt] = [i for row in rows for i in row]
  return ids_bt, is_token_bt


def bucket(count: int, least: int = 16) -> int:
  """Rounds up to a power of two, so that few shapes are ever compiled."""
  return max(least, 1 << (count - 1).bit_length())


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
  if tokenizer is None:
    raise UserError("this model has no tokenizer: give token ids instead of text")
  return tokenizer


def _is_id(value) -> bool:
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
