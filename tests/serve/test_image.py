"""An image's patches: which pixels they hold, in which order, on which scale."""

import numpy as np
import PIL.Image
import pytest

from llmjax.core.errors import UserError
from llmjax.models.config import VisionConfig
from llmjax.serve.image import read_image

VISION = VisionConfig(image_size=8, patch=4)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def test_an_image_of_the_models_size_is_cut_and_standardized():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
  patches = read_image(PIL.Image.fromarray(pixels), VISION)
  assert patches.shape == (4, 48) and patches.dtype == np.float32
  for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
    for channel in range(3):
      square = pixels[row : row + 4, column : column + 4, channel]
      want = (square / 255 - MEAN[channel]) / STD[channel]
      found = patches[number, channel * 16 : channel * 16 + 16].reshape(4, 4)
      np.testing.assert_allclose(found, want, atol=1e-5)  # fp32 against float64, values up to 2.2


def test_the_middle_of_a_wide_image_is_read():
  pixels = np.zeros((8, 20, 3), np.uint8)
  pixels[:, 6:14] = 255
  patches = read_image(PIL.Image.fromarray(pixels), VISION)
  white = ((1 - MEAN) / STD).repeat(16)
  np.testing.assert_allclose(patches, np.tile(white, (4, 1)), atol=1e-5)  # fp32 against float64


def test_a_large_image_is_scaled_and_a_grey_one_gets_three_channels():
  image = PIL.Image.fromarray(np.full((40, 24), 51, np.uint8))
  patches = read_image(image, VISION)
  grey = ((0.2 - MEAN) / STD).repeat(16)
  np.testing.assert_allclose(patches, np.tile(grey, (4, 1)), atol=1e-5)  # fp32 against float64


def test_a_model_of_grey_images_takes_no_file():
  with pytest.raises(UserError, match="1 channels"):
    read_image("x.png", VisionConfig(image_size=8, patch=4, channels=1))
