"""transformers' image processors of Pillow give the same pixels, for every class and mode."""

import importlib

import numpy as np
import PIL.Image
import pytest

from llmjax.models.config import VisionConfig
from llmjax.models.processor import from_dict
from llmjax.models.vision import patchify
from llmjax.serve.image import prepare, read_image

pytestmark = pytest.mark.oracle

BOX, EDGE = {"height": 24, "width": 24}, {"shortest_edge": 24}
CASES = {
  "CLIP": {"size": EDGE, "crop_size": BOX},
  "CLIP number": {"size": 26, "crop_size": 24, "resample": 2},
  "CLIP small": {"size": {"height": 20, "width": 31}, "crop_size": {"height": 25, "width": 28}},
  "CLIP plain": {"size": EDGE, "crop_size": BOX, "do_normalize": False, "do_rescale": False},
  "ViT": {"size": BOX},
  "ViT number": {"size": 24, "resample": 0, "image_mean": [0.1, 0.2, 0.3]},
  "ViT colours": {"size": BOX, "do_convert_rgb": True, "rescale_factor": 1 / 127.5},
  "Siglip": {"size": BOX},
  "Siglip number": {"size": 24},
  "Llava": {"size": EDGE, "crop_size": BOX, "do_pad": True},
  "Gemma3": {"size": BOX},
}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F", "HSV", "LAB")


def picture(mode: str, size=(37, 21)) -> PIL.Image.Image:
  rng = np.random.default_rng(3)
  if mode in ("I;16", "F"):
    values = rng.integers(0, 300, size).astype({"I;16": np.uint16, "F": np.float32}[mode])
    return PIL.Image.fromarray(values)
  image = PIL.Image.fromarray(rng.integers(0, 256, (*size, 4), np.uint8))
  if mode == "P":
    image = image.convert("RGB").convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=9)
    image.info["transparency"] = 2
    return image
  return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case):
  name = case.split()[0]
  module = f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}"
  theirs = getattr(importlib.import_module(module), f"{name}ImageProcessorPil")(**CASES[case])
  ours = from_dict(theirs.to_dict())
  assert from_dict({"image_processor_type": f"{name}ImageProcessor"} | CASES[case]) == ours
  taken = 0
  for mode in MODES:
    for size in ((37, 21), (20, 45), (24, 24)):
      image = picture(mode, size)
      try:
        [want] = theirs(image, return_tensors="np")["pixel_values"]
      except ValueError:
        continue
      if want.shape[0] != 3:
        continue
      # The same steps of Pillow; the rest is fp32.
      np.testing.assert_allclose(prepare(image, ours), want.transpose(1, 2, 0), atol=1e-6)
      taken += 1
  assert taken >= 3 * (4 if name == "ViT" and case != "ViT colours" else len(MODES))


@pytest.mark.parametrize("mode", MODES)
def test_files_are_opened_as_transformers_opens_them(mode, tmp_path):
  from transformers.image_utils import load_image
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  if mode == "HSV":
    pytest.skip("no format of files holds it")
  ending = {"F": "tif", "LAB": "tif", "CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
  file = tmp_path / f"a.{ending}"
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  image = picture(mode)
  image.save(file, exif=exif)
  theirs = CLIPImageProcessorPil(size=EDGE, crop_size=BOX)
  opened = load_image(str(file))
  [want] = theirs(opened, return_tensors="np")["pixel_values"]
  assert opened.size == image.size[::-1]
  found = read_image(file, VisionConfig(image_size=24, patch=8), from_dict(theirs.to_dict()))
  np.testing.assert_allclose(found, patchify(want.transpose(1, 2, 0)[None], 8)[0], atol=1e-6)
