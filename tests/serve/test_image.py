"""An image's patches: which pixels they hold, in which order, on which scale."""

import dataclasses
import json
import shutil

import numpy as np
import PIL.Image
import pytest

import llmjax
from llmjax.core.errors import UserError
from llmjax.models.config import VisionConfig
from llmjax.models.processor import Processor, from_dict, read, write
from llmjax.serve.image import prepare, read_image
from tests.conftest import ROOT

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


def pixels_of(values, image):
  return prepare(image, from_dict(values))


def grey(*rows):
  """An image of three equal channels."""
  return PIL.Image.fromarray(np.array(rows, np.uint8)[..., None].repeat(3, axis=-1))


# Steps turned off one by one, so that what is left can be worked out by hand.
BARE = {"image_processor_type": "ViTImageProcessor", "do_rescale": False, "do_normalize": False}


@pytest.mark.parametrize(
  ("values", "image", "want"),
  [
    ({"do_resize": False}, grey([0, 51], [102, 255]), [[0, 51], [102, 255]]),
    ({"do_resize": False, "do_rescale": True}, grey([0, 51]), [[0, 0.2]]),
    ({"do_resize": False, "do_rescale": True, "rescale_factor": 2}, grey([3]), [[6]]),
    ({"do_resize": False, "do_normalize": True, "image_std": 2}, grey([3]), [[1.25]]),
    ({"size": 2, "resample": 0}, grey([7, 9]), [[7, 9], [7, 9]]),
    ({"size": {"height": 1, "width": 4}, "resample": 0}, grey([7, 9]), [[7, 7, 9, 9]]),
    ({"size": {"shortest_edge": 2}, "resample": 0}, grey([7, 9]), [[7, 7, 9, 9]] * 2),
    (
      {"do_resize": False, "do_center_crop": True, "crop_size": 2},
      grey([1, 2, 3, 4, 5]),
      [[0, 0], [2, 3]],
    ),
    (
      {
        "image_processor_type": "LlavaImageProcessorFast", "do_pad": True, "do_resize": False,
        "do_center_crop": False, "image_mean": [0.1, 0.1, 0.1],
      },
      grey([1, 2, 3]),
      [[25] * 3, [1, 2, 3], [25] * 3],
    ),
  ],
)
def test_every_step_is_taken_as_its_keys_say(values, image, want):
  found = pixels_of(BARE | values, image)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, np.array(want)[..., None].repeat(3, axis=-1), rtol=1e-6)


def test_what_is_transparent_lies_over_white_and_a_file_is_turned_upright(tmp_path):
  clip = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
  half = PIL.Image.fromarray(np.full((1, 1, 4), (0, 100, 200, 51), np.uint8))
  assert pixels_of(clip, half).tolist() == [[[204, 224, 244]]]
  palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.info["transparency"] = 0
  assert pixels_of(clip, palette).tolist() == [[[255] * 3, [40, 50, 60]]]
  with pytest.raises(UserError, match="does not make RGB of an image of mode RGBA"):
    pixels_of(BARE, half)
  sides = np.zeros((8, 8, 3), np.uint8)
  sides[:4] = 255  # white above
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # turned to the left: what is above is on the right when it is shown
  PIL.Image.fromarray(sides).save(tmp_path / "a.png", exif=exif)
  right = read_image(tmp_path / "a.png", VISION)[:, 0] > 0
  assert right.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"image_processor_type": "PixtralImageProcessor"}, "'PixtralImageProcessor' is not known"),
    ({"do_pan_and_scan": True}, "do_pan_and_scan not supported"),
    ({"do_pad": True}, "do_pad not supported"),
    ({"size": {"shortest_edge": 2, "longest_edge": 4}}, "size .* are not supported"),
    ({"size": {"max_height": 2, "max_width": 4}}, "size .* are not supported"),
    ({"resample": 9}, "resample 9"),
    ({"do_center_crop": True}, "without crop_size"),
    ({"image_mean": [0.5]}, "three channels"),
    ({"rescale_factor": float("nan")}, "not a finite number"),
  ],
)
def test_what_changes_an_image_and_is_not_known_is_refused(values, message, tmp_path):
  theirs = {"image_processor_type": "Gemma3ImageProcessor"} | values
  with pytest.raises(UserError, match=message):
    from_dict(theirs)
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(theirs))
  refused = read(tmp_path, "decoder")
  with pytest.raises(UserError, match=message):
    read_image(PIL.Image.new("RGB", (8, 8)), VISION, refused)


def test_a_folder_says_how_images_are_prepared_and_keeps_it(tmp_path):
  assert read(tmp_path, "decoder") is None
  alone = tmp_path / "preprocessor_config.json"
  alone.write_text(json.dumps({"size": 8, "resample": 2, "do_center_crop": None}))
  as_vit, as_clip = read(tmp_path, "vision"), read(tmp_path, "decoder")
  assert (as_vit.size, as_vit.do_center_crop) == ({"height": 8, "width": 8}, False)
  assert (as_clip.size, as_clip.do_center_crop) == ({"shortest_edge": 8}, True)
  old = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 8, "image_std": [1, 2, 3]}
  whole = {"image_processor": old, "patch_size": 4}
  (tmp_path / "processor_config.json").write_text(json.dumps(whole))
  nested = read(tmp_path, "vision")
  assert (nested.name, nested.image_std) == ("CLIPImageProcessor", (1, 2, 3))
  for number, one in enumerate((as_vit, as_clip, nested)):
    folder = tmp_path / str(number)
    folder.mkdir()
    write(one, folder)
    assert read(folder, "decoder") == one
    assert Processor(**json.loads(json.dumps(dataclasses.asdict(one)))) == one
  with pytest.raises(UserError, match="makes 224 by 224 pixels of 3 channels; the model"):
    read_image(PIL.Image.new("RGB", (8, 8)), VISION, from_dict({}))


def test_a_llava_keeps_it_through_every_format(tmp_path, capsys):
  shutil.copytree(ROOT / "tests/golden/llava", tmp_path / "hf")
  plain = llmjax.load(tmp_path / "hf")
  assert "no preprocessor_config.json: images are prepared as CLIP's" in capsys.readouterr().err
  side = plain.config.vision.image_size
  said = {"image_processor_type": "SiglipImageProcessor", "size": side}
  (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(said))
  with pytest.raises(UserError, match=r"makes .* pixels"):  # the shorter edge, without a crop
    wide = PIL.Image.new("RGB", (2 * side, side))
    read_image(wide, plain.config.vision, llmjax.load(tmp_path / "hf").processor)
  said["size"] = {"height": side, "width": side}
  (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(said))
  llmjax.convert(tmp_path / "hf", tmp_path / "checkpoint", format="checkpoint")
  llmjax.convert(tmp_path / "checkpoint", tmp_path / "again")
  for folder in ("hf", "checkpoint", "again"):
    model = llmjax.load(tmp_path / folder)
    assert model.processor == from_dict(said)
    black = PIL.Image.new("RGB", (3 * side, side))
    assert (read_image(black, model.config.vision, model.processor) == -1).all()
