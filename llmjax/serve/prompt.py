"""Prompts as token ids, with what a model's kind, tokenizer and chat template add to a text. A
decoder continues the text, an encoder-decoder reads it and begins anew. Each image stands in a row
as one image token for every patch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.inputs import check_lengths, encode_input
from llmjax.models.processor import Processor
from llmjax.serve.image import read_image
from llmjax.text.chat import render, token_values
from llmjax.text.tokenizer import Tokenizer, framed, start_id

_ANSWER = "this is what the assistant says"


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts of a model.

  Attributes:
    rows: ids that the decoder begins with, one row a prompt.
    sources: ids that the encoder of an encoder_decoder reads; None for other kinds.
    patches_bsi: fp32 images of each row, in the order of its image tokens; None without images.
  """

  rows: Sequence[Sequence[int]]
  sources: Sequence[Sequence[int]] | None = None
  patches_bsi: np.ndarray | None = None


def encode_prompts(
  config: ModelConfig,
  tokenizer: Tokenizer,
  inputs: Sequence,
  images=None,
  chat: bool = False,
  special: bool = False,
  processor: Processor | None = None,
) -> Prompts:
  """Encodes prompts.

  Args:
    inputs: texts, rows of ids or lists of chat messages.
    images: for each prompt a sequence of image files or open images; None: no images.
    chat: each text is a user's message, put into the tokenizer's chat template.
    special: special tokens that a text spells out become their ids.
    processor: how images are prepared; None: as CLIP's.
  Returns:
    The prompts as ids, with the tokenizer's affixes (`framed`), or as the chat template has them.
  Raises:
    UserError: a prompt leaves no room in the context, or the model takes no such prompts.
  """
  if not inputs:
    return Prompts([])
  if config.kind not in ("decoder", "encoder_decoder"):
    raise UserError(f"a model of kind {config.kind!r} writes no text")
  if chat and special:
    raise UserError("in a chat the template alone writes special tokens: leave out special")
  images = [()] * len(inputs) if images is None else images
  _check_images(config, inputs, images)
  pairs = zip(inputs, images, strict=True)
  rows = [_encode(config, tokenizer, one, len(shown), chat, special) for one, shown in pairs]
  if config.kind == "encoder_decoder":
    prompts = _as_sources(config, tokenizer, rows)
  else:
    prompts = Prompts(rows, patches_bsi=_patches(config, images, processor))
  check_prompts(prompts, config.max_seq_len)
  return prompts


def check_prompts(prompts: Prompts, context: int):
  """Raises a `UserError` where a prompt or source is empty, or too long to write one more token."""
  check_lengths("prompt", prompts.rows, context - 1, context)
  check_lengths("source", prompts.sources or (), context, context)


def end_ids(tokenizer: Tokenizer, chat: bool = False) -> list[int]:
  """The ids that end what a model writes: EOS, the model's other end tokens, and in a chat what
  ends the assistant's turn.

  The latter is the first special token after an answer, as the tokenizer's template writes one.
  """
  found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  found += tokenizer.settings.ends or ()
  if chat:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = render(tokenizer.chat_template, turns, **token_values(tokenizer))
    ids = tokenizer.encode(after.rpartition(_ANSWER)[2], allow_special=True)
    found += [i for i in ids if i in tokenizer.special_names][:1]
  return list(dict.fromkeys(found))


def _encode(config, tokenizer, one, images: int, chat: bool, special: bool) -> list[int]:
  """One prompt's ids, an image token for every patch."""
  if chat and isinstance(one, str):
    content = [{"type": "image"}] * images + [{"type": "text", "text": one}]
    one = [{"role": "user", "content": content if images else one}]
  if images and isinstance(one, str):
    ids = _with_image_tokens(config, tokenizer, one, images, special)
    ids = framed(tokenizer, config.kind, ids)
  else:
    ids = encode_input(one, tokenizer, config.kind, special, answer=True)
  return _expand(config, ids, images)


def _with_image_tokens(config, tokenizer, text: str, images: int, special: bool) -> list[int]:
  """Encodes a text whose image tokens are spelled out, or all stand before it."""
  image_token = config.vision.image_token
  names = [name for name, i in tokenizer.special_tokens.items() if i == image_token]
  pieces = text.split(names[0]) if names else [text]
  ids = [image_token] * images if len(pieces) == 1 else []
  for number, piece in enumerate(pieces):
    ids += [image_token] * (number > 0) + tokenizer.encode(piece, special)
  return ids


def _expand(config, ids: list[int], images: int) -> list[int]:
  vision = config.vision
  tokens = ids.count(vision.image_token) if vision.image_size else 0
  if tokens != images:
    raise UserError(f"the prompt has {tokens} image tokens for {images} images")
  return [i for i in ids for _ in range(vision.patches if i == vision.image_token else 1)]


def _check_images(config: ModelConfig, prompts, images):
  if len(images) != len(prompts):
    raise UserError(f"{len(images)} lists of images for {len(prompts)} prompts")
  if any(images) and not (config.kind == "decoder" and config.vision.image_size):
    raise UserError("this model takes no images")


def _patches(config: ModelConfig, images, processor) -> np.ndarray | None:
  """Reads all images; prompts with fewer than others are padded with zeros."""
  most = max(map(len, images))
  if not most:
    return None
  vision = config.vision
  patches = np.zeros((len(images), most, vision.patches, vision.patch_numbers), np.float32)
  for prompt, shown in enumerate(images):
    for number, image in enumerate(shown):
      patches[prompt, number] = read_image(image, vision, processor)
  return patches.reshape(len(images), most * vision.patches, vision.patch_numbers)


def _as_sources(config: ModelConfig, tokenizer: Tokenizer, rows) -> Prompts:
  if config.source_vocab_size:
    raise UserError(
      "this model reads sources of another vocabulary than its tokenizer's: give generate_ids "
      "Prompts(rows, sources) of ids"
    )
  first = config.embed.start_token
  first = start_id(tokenizer) if first < 0 else first
  return Prompts([[first] for _ in rows], rows)
