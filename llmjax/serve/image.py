"""Image files as the patches a model reads, prepared step by step as its `Processor` says."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from llmjax.core.errors import UserError
from llmjax.models.config import VisionConfig
from llmjax.models.processor import Processor, usual
from llmjax.models.vision import patchify


def read_image(
  image: str | Path | PIL.Image.Image, vision: VisionConfig, processor: Processor | None = None
) -> np.ndarray:
  """Turns an image into patches.

  Args:
    image: file of any format that Pillow reads, turned as its EXIF data say; or an open image,
      taken as it lies.
    vision: side of an image and of a patch; three channels.
    processor: the steps; None: CLIP's, to the model's side.
  Returns:
    patches_si, fp32.
  Raises:
    UserError: no such file, not an image, a model of another number of channels, or steps that
      are not supported or do not lead to the model's size.
  Source: transformers' image processors, those that use Pillow.
  """
  if vision.channels != 3:
    raise UserError(f"this model's images have {vision.channels} channels; a file has 3")
  processor = processor or usual(vision.image_size)
  if processor.refused:
    raise UserError(processor.refused)
  if not isinstance(image, PIL.Image.Image):
    image = PIL.ImageOps.exif_transpose(_open(image)).convert("RGB")
  pixels = prepare(image, processor)
  side = vision.image_size
  if pixels.shape != (side, side, 3):
    height, width, channels = pixels.shape
    raise UserError(
      f"the image processor makes {height} by {width} pixels of {channels} channels; the model "
      f"reads {side} by {side} of 3"
    )
  return np.asarray(patchify(pixels[None], vision.patch)[0])


def _open(path) -> PIL.Image.Image:
  try:
    image = PIL.Image.open(path)
    image.load()
    return image
  except PIL.UnidentifiedImageError as error:
    raise UserError(f"{str(path)!r} is not an image that Pillow knows") from error
  except Exception as error:  # Pillow's decoders raise anything at a damaged file
    raise UserError(f"image {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def prepare(image: PIL.Image.Image, processor: Processor) -> np.ndarray:
  """Applies a processor's steps: pixels [height, width, channels], fp32."""
  pixels = np.asarray(_rgb(image) if processor.do_convert_rgb else image)
  if pixels.ndim != 3 or pixels.shape[-1] != 3:
    raise UserError(
      f"the model's image processor does not make RGB of an image of mode {image.mode}; convert it"
    )
  image = PIL.Image.fromarray(pixels)
  if processor.do_pad:
    colour = tuple(int(mean * 255) for mean in processor.image_mean)
    image = _pad_to_square(image, colour)
  if processor.do_resize:
    image = image.resize(_resized(image.size, processor.size), processor.resample)
  pixels = np.asarray(image)
  if processor.do_center_crop:
    pixels = _center_crop(pixels, processor.crop_size["height"], processor.crop_size["width"])
  if processor.do_rescale:
    pixels = (pixels.astype(np.float64) * processor.rescale_factor).astype(np.float32)
  pixels = pixels.astype(np.float32)
  if processor.do_normalize:
    pixels = (pixels - np.float32(processor.image_mean)) / np.float32(processor.image_std)
  return pixels


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """Converts to RGB; transparent pixels show white."""
  if "A" not in image.getbands() and image.info.get("transparency") is None:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
  return PIL.Image.alpha_composite(white, image).convert("RGB")


def _pad_to_square(image: PIL.Image.Image, colour: tuple[int, ...]) -> PIL.Image.Image:
  side = max(image.size)
  square = PIL.Image.new("RGB", (side, side), colour)
  square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return square


def _resized(size: tuple[int, int], wanted: dict) -> tuple[int, int]:
  """The (width, height) to scale to: as given, or so that the shorter edge is as given."""
  if "shortest_edge" not in wanted:
    return wanted["width"], wanted["height"]
  return tuple(int(wanted["shortest_edge"] * n / min(size)) for n in size)


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Crops around the center, after padding with black where the image is too small."""
  for axis, size in enumerate((height, width)):
    missing = max(0, size - pixels.shape[axis])
    padding = [(0, 0)] * pixels.ndim
    padding[axis] = (missing - missing // 2, missing // 2)
    first = (pixels.shape[axis] + missing - size) // 2
    pixels = np.pad(pixels, padding).take(range(first, first + size), axis)
  return pixels
