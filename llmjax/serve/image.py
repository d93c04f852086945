"""Image files as the patches a model reads, prepared as CLIP was trained.

The shorter side is scaled to the model's, the middle is cut out, colours are standardized.
"""

from pathlib import Path

import numpy as np
import PIL.Image

from llmjax.core.errors import UserError
from llmjax.models.config import VisionConfig
from llmjax.models.vision import patchify

# Mean and standard deviation of red, green and blue in [0, 1]: openai/CLIP, clip/clip.py.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def read_image(image: str | Path | PIL.Image.Image, vision: VisionConfig) -> np.ndarray:
  """Turns an image into patches.

  Args:
    image: file of any format that Pillow reads, or an open image.
    vision: side of an image and of a patch; three channels.
  Returns:
    patches_si, fp32.
  Raises:
    UserError: no such file, not an image, or a model of another number of channels.
  Source: Radford et al. 2021, arXiv:2103.00020, released preprocessing: bicubic, centre crop.
  """
  if vision.channels != 3:
    raise UserError(f"this model's images have {vision.channels} channels; a file has 3")
  if not isinstance(image, PIL.Image.Image):
    image = _open(image)
  square = _middle(image.convert("RGB"), vision.image_size)
  pixels = (np.asarray(square, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
  return np.asarray(patchify(pixels[None], vision.patch)[0])


def _open(path) -> PIL.Image.Image:
  try:
    return PIL.Image.open(path)
  except PIL.UnidentifiedImageError as error:
    raise UserError(f"{str(path)!r} is not an image that Pillow knows") from error
  except OSError as error:
    raise UserError(f"image {str(path)!r}: {error.strerror or error}") from error


def _middle(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
  """Scales the shorter side to `side` and cuts the longer one to it, evenly at both ends."""
  width, height = image.size
  shorter = min(width, height)
  scaled = (side * width // shorter, side * height // shorter)
  image = image.resize(scaled, PIL.Image.Resampling.BICUBIC)
  left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
  return image.crop((left, top, left + side, top + side))
