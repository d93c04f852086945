"""Tiny random models of every family as transformers saves them, and what it says of them.

`make test-oracle` makes these folders anew with torch and compares; `make test` reads them. Inputs
are drawn here with numpy, so both sides have the same.
"""

from pathlib import Path

import jax
import numpy as np

from llmjax.data.batch import Batch
from llmjax.models.vision import patchify
from tests.golden.cases import CASES

FOLDER = Path(__file__).parent
IMAGE_TOKEN = 36
PATCHES = 4
__all__ = ["CASES", "FOLDER", "inputs", "our_logits", "token_ids"]


def token_ids() -> np.ndarray:
  """Draws the inputs: [2, 17] ids, of which the first 16 are read and the last 16 predicted."""
  return np.random.default_rng(1).integers(4, 36, (2, 17))


def inputs(name: str) -> dict[str, np.ndarray]:
  """Draws what a case's model reads, under transformers' names; images are channels first."""
  rng = np.random.default_rng(2)
  ids = token_ids()[:, :16]
  mask = np.ones_like(ids)
  mask[1, 11:] = 0
  images = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
  match name.split("_")[0]:
    case "bert" | "roberta":
      types = {"token_type_ids": rng.integers(0, 3, ids.shape)} if name == "bert" else {}
      return {"input_ids": ids, "attention_mask": mask, **types}
    case "t5" | "marian":
      return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, 3:12]}
    case "vit":
      return {"pixel_values": images}
    case "llava":
      ids[:, 2 : 2 + PATCHES] = IMAGE_TOKEN
      return {"input_ids": ids, "pixel_values": images}
  return {"input_ids": ids}


def our_batch(given: dict) -> Batch:
  """The same inputs as llmjax takes them."""
  ids, mask = given.get("input_ids"), given.get("attention_mask")
  patches = None
  if "pixel_values" in given:
    patches = patchify(given["pixel_values"].transpose(0, 2, 3, 1), 4)
  if "decoder_input_ids" in given:
    return Batch(given["decoder_input_ids"], source_bs=ids, source_segments_bs=mask)
  return Batch(ids, segments_bt=mask, types_bt=given.get("token_type_ids"), patches_bsi=patches)


@jax.jit
def _forward(parameters, batch):
  return parameters.logits(parameters.hidden(batch)[0])


def our_logits(model, name: str) -> np.ndarray:
  """Runs our model on a case's inputs; rows of padding are zeroed, since nobody defines them."""
  given = inputs(name)
  return zero_padding(np.asarray(_forward(model.parameters, our_batch(given))), given)


def zero_padding(logits, given) -> np.ndarray:
  """Zeroes the logits at padding; one row a position (a class has position 0)."""
  logits = logits.reshape(len(logits), -1, logits.shape[-1])
  if "decoder_input_ids" in given or "attention_mask" not in given:
    return logits
  return logits * given["attention_mask"][..., None]
