"""Image preprocessing as `preprocessor_config.json` describes it, read and written. Keys, classes
and their defaults are those of transformers' image processors."""

import dataclasses
from pathlib import Path

from llmjax.core.choices import check_finite
from llmjax.core.errors import UserError, nearest
from llmjax.core.files import read_json, write_json

_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073)}
_CLIP["image_std"] = (0.26862954, 0.26130258, 0.27577711)
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CROPPED = _CLIP | {
  "size": {"shortest_edge": 224}, "do_center_crop": True, "default_to_square": False,
  "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True,
}
_RESIZED = _HALF | {"size": {"height": 224, "width": 224}}
# Class → its defaults that differ from those of `Processor`. Numbers of resample are Pillow's.
_CLASSES = {
  "CLIPImageProcessor": _CROPPED,
  "LlavaImageProcessor": _CROPPED,
  "ViTImageProcessor": _RESIZED | {"resample": 2},
  "SiglipImageProcessor": _RESIZED | {"do_convert_rgb": True, "default_to_square": False},
  "Gemma3ImageProcessor": _RESIZED | {"do_convert_rgb": True, "resample": 2},
}
# Keys that do not change the pixels.
_HARMLESS = (
  "image_processor_type", "feature_extractor_type", "processor_class", "image_seq_length",
  "return_tensors", "input_data_format", "data_format", "device", "disable_grouping", "pad_size",
  "model_input_names",
)
_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Processor:
  """The steps from an image to pixels, in order.

  Attributes:
    name: class in transformers.
    do_convert_rgb: an open image becomes RGB, over white where it is transparent.
    do_pad: pads the shorter side to a square, with the mean colour (LlavaImageProcessor).
    do_resize: to `size` (height and width, or shortest_edge), with Pillow's filter `resample`.
    do_center_crop: crops to `crop_size` (height and width), or pads with black.
    do_rescale: multiplies by `rescale_factor`.
    do_normalize: subtracts `image_mean` and divides by `image_std`, one number a channel.
    refused: why the model's own preprocessing is not supported, if it is not.
  """

  name: str = "CLIPImageProcessor"
  do_convert_rgb: bool = False
  do_pad: bool = False
  do_resize: bool = True
  size: dict = dataclasses.field(default_factory=dict)
  resample: int = 3
  do_center_crop: bool = False
  crop_size: dict = dataclasses.field(default_factory=dict)
  do_rescale: bool = True
  rescale_factor: float = 1 / 255
  do_normalize: bool = True
  image_mean: tuple[float, ...] = _CLIP["image_mean"]
  image_std: tuple[float, ...] = _CLIP["image_std"]
  refused: str = ""

  def __post_init__(self):
    for name in ("image_mean", "image_std"):  # lists in a checkpoint
      object.__setattr__(self, name, tuple(getattr(self, name)))


_STEPS = [field.name for field in dataclasses.fields(Processor)][1:-1]


def usual(side: int) -> Processor:
  """CLIP's preprocessing to a square of `side` pixels."""
  size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
  return from_dict({"image_processor_type": "CLIPImageProcessor"} | size)


def read(folder: Path, kind: str) -> Processor | None:
  """Reads a folder's image processor: None without one, a `refused` one where it is unsupported.

  Args:
    kind: of the model, which decides the default class: vision is a ViT.
  """
  combined, separate = (folder / name for name in _FILES)
  default = "ViTImageProcessor" if kind == "vision" else "CLIPImageProcessor"
  try:
    config = read_json(combined).get("image_processor") if combined.is_file() else None
    if config is None and separate.is_file():
      config = read_json(separate)
    return None if config is None else from_dict(config, default)
  except UserError as error:
    return Processor(refused=f"{folder}: {error}")


def from_dict(config: dict, default: str = "CLIPImageProcessor") -> Processor:
  """Reads the object of a `preprocessor_config.json`.

  Raises:
    UserError: a class, a key or a value that is not known here and changes the result.
  """
  kind = config.get("image_processor_type") or config.get("feature_extractor_type") or default
  name = kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
  if name not in _CLASSES:
    raise UserError(f"image processor {kind!r} is not known; {nearest(name, _CLASSES)}")
  values = _CLASSES[name] | {key: value for key, value in config.items() if value is not None}
  default_square = values.pop("default_to_square", True)
  settings = {key: values.pop(key) for key in _STEPS if key in values}
  unknown = [key for key, value in values.items() if value and key not in _HARMLESS]
  if settings.get("do_pad") and name != "LlavaImageProcessor":
    unknown.append("do_pad")
  if unknown:
    raise UserError(f"image processor {kind}: {', '.join(unknown)} not supported")
  for key, square in (("size", default_square), ("crop_size", True)):
    if key in settings:
      settings[key] = _size(key, settings[key], square)
  for key in ("image_mean", "image_std"):
    value = settings[key]
    settings[key] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
  if len(settings["image_mean"]) != 3 or len(settings["image_std"]) != 3:
    raise UserError(f"image processor {kind}: image_mean and image_std are of three channels")
  if settings.get("do_center_crop") and not settings.get("crop_size"):
    raise UserError(f"image processor {kind}: do_center_crop without crop_size")
  if settings.get("resample", 0) not in range(6):
    raise UserError(f"image processor {kind}: resample {settings['resample']!r} is not 0 to 5")
  check_finite("image processor", tuple(settings.values()))
  return Processor(name, **settings)


def _size(key: str, value, square: bool) -> dict:
  if isinstance(value, int):
    value = {"height": value, "width": value} if square else {"shortest_edge": value}
  elif isinstance(value, (list, tuple)) and len(value) == 2:
    value = dict(zip(("height", "width"), value, strict=True))
  known = (["height", "width"], *([["shortest_edge"]] if key == "size" else []))
  wanted = {name: n for name, n in value.items() if n} if isinstance(value, dict) else {}
  if sorted(wanted) not in known:
    raise UserError(f"images of {key} {value!r} are not supported; known: {known}")
  return wanted


def write(processor: Processor, folder: Path):
  """Writes `preprocessor_config.json`, for transformers and for `read`."""
  if not processor.refused:
    values = {key: getattr(processor, key) for key in _STEPS}
    steps = {key: value for key, value in values.items() if value != {}}
    write_json(folder / _FILES[1], {"image_processor_type": processor.name} | steps)
