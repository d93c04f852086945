"""Hugging Face folders, read and written: `config.json`, safetensors, a tokenizer. Families are
tables, which `hf.family` and `hf.layout` read in both directions."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from llmjax.core import tree
from llmjax.core.errors import UserError, nearest, note
from llmjax.core.files import read_json, write_json
from llmjax.formats.hf.canonical import canonical
from llmjax.formats.hf.decoders import DECODERS
from llmjax.formats.hf.encdec import MARIAN, T5
from llmjax.formats.hf.encoders import BERT, ROBERTA
from llmjax.formats.hf.family import Family, misfits, read_config, write_config
from llmjax.formats.hf.files import DTYPES, open_tensors, save_tensors
from llmjax.formats.hf.layout import Tensors, from_tensors, matches, to_tensors
from llmjax.formats.hf.moe import MOES
from llmjax.formats.hf.vision import GEMMA3_SHELL, LLAVA, VIT
from llmjax.models import pooling, processor
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.text.folder import load_tokenizer, tokenizer_file
from llmjax.text.tokenizer import start_id

ALL = (*DECODERS, *MOES, BERT, ROBERTA, T5, MARIAN, VIT, LLAVA, GEMMA3_SHELL)
FAMILIES = {family.name: family for family in ALL}


def is_folder(path) -> bool:
  """Tells a Hugging Face folder by its `config.json`."""
  return (Path(path) / "config.json").is_file()


def load_folder(path) -> Model:
  """Loads a folder of `config.json` and safetensors; weights become fp32.

  Args:
    path: the folder; a tokenizer in it is read as well, or a note says why there is none.
  Returns:
    The model, computing in fp32.
  Raises:
    UserError: no such family, a config llmjax cannot compute with, a damaged file, a tensor that is
      missing, left over or of another shape.
  """
  path = Path(path)
  raw = read_json(path / "config.json")
  family = family_of(raw)
  tensors = open_tensors(path, family.aliases)
  config = _tied(family, read_config(family, raw), tensors)
  parameters = read_tensors(family, config, tensors)
  images = processor.read(path, config.kind) if config.vision.image_size else None
  if config.vision.image_size and not images:
    note(f"{path} has no preprocessor_config.json: images are prepared as CLIP's")
  return Model(config, parameters, _tokenizer(path, config.kind), pooling.read(path), images)


def family_of(raw: dict) -> Family:
  """Finds the family that a `config.json` names."""
  name = raw.get("model_type")
  if name not in FAMILIES:
    raise UserError(f"model_type {name!r} is not one of llmjax's; {nearest(str(name), FAMILIES)}")
  return FAMILIES[name]


def read_tensors(family: Family, config: ModelConfig, tensors: Tensors):
  """Builds a family's model from tensors, copies and buffers left out."""
  dropped = [name for name in tensors if matches(name, family.dropped)]
  if dropped:
    note(f"{len(dropped)} tensors have no place in llmjax and are left out, such as {dropped[0]!r}")
  kept = {
    name: reader
    for name, reader in tensors.data.items()
    if not matches(name, family.dropped + family.ignore)
    and not family.skip(name, config)
    and not _is_copy(family, name, tensors)
  }
  return from_tensors(config, Tensors(kept), family.tensors, family.offset, family.optional)


def _is_copy(family, name, tensors) -> bool:
  original = family.copies.get(name)
  return original in tensors and np.array_equal(tensors[name], tensors[original])


def _tied(family: Family, config: ModelConfig, tensors: Tensors) -> ModelConfig:
  """Decides by the tensors whether the head reads the embedding, as transformers does."""
  head = family.name_of("embed/head_dv")
  if config.tie_embeddings and head in tensors and not _is_copy(family, head, tensors):
    note(f"{head} differs from the embedding, so they are not tied, whatever config.json says")
    return dataclasses.replace(config, tie_embeddings=False)
  if not config.tie_embeddings and family.head_optional and head not in tensors:
    return dataclasses.replace(config, tie_embeddings=True)
  return config


def _tokenizer(path: Path, kind: str):
  """The tokenizer; an unknown one does not keep the weights from being used."""
  try:
    return load_tokenizer(path) if kind != "vision" or tokenizer_file(path) else None
  except UserError as error:
    note(f"the model has no tokenizer: {error}")
    return None


def save_folder(model: Model, path, dtype: str = "float32", family: str = ""):
  """Writes a folder that transformers loads unchanged, but for the tokenizer's own files.

  Args:
    model: any model that one of the families can hold.
    path: folder, made if it is missing.
    dtype: of the tensors: float32, bfloat16 or float16.
    family: `model_type` to write; by default the first that fits.
  Raises:
    UserError: no family holds this architecture; the message says what the nearest one lacks.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} is unknown; {nearest(dtype, DTYPES)}")
  model = _with_start_token(model)
  chosen = choose(model.config, family)
  config, leaves = half_layout(model)
  tensors = to_tensors(config, leaves, chosen.tensors, chosen.offset)
  for name, (value, like) in chosen.constants.items():
    tensors[name] = np.full_like(tensors[like], value)
  ids, start = _token_ids(model), "decoder_start_token_id"
  raw = ids | write_config(chosen, config) | {"torch_dtype": dtype}
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  write_json(path / "config.json", raw)
  ids |= {start: raw[start]} if start in raw else {}
  ends = getattr(getattr(model.tokenizer, "settings", None), "ends", None)
  if ends:
    ids["eos_token_id"] = [i for i in (ids["eos_token_id"], *ends) if i is not None]
  if any(value is not None for value in ids.values()):
    write_json(path / "generation_config.json", ids)
  if model.pooling is not None:
    pooling.write(model.pooling, path, config.width)
  if model.processor is not None:
    processor.write(model.processor, path)
  # safetensors writes an array's memory as it lies, so it has to lie in C order.
  cast = {name: array.astype(DTYPES[dtype], order="C") for name, array in tensors.items()}
  save_tensors(cast, path)


def _with_start_token(model: Model) -> Model:
  config, embed = model.config, model.config.embed
  if config.kind != "encoder_decoder" or embed.start_token >= 0 or model.tokenizer is None:
    return model
  embed = dataclasses.replace(embed, start_token=start_id(model.tokenizer))
  return dataclasses.replace(model, config=dataclasses.replace(config, embed=embed))


def choose(config: ModelConfig, name: str = "") -> Family:
  """Finds a family that holds an architecture; with `name` it can only be that one.

  Raises:
    UserError: there is none; the message names what the nearest one lacks.
  """
  if name and name not in FAMILIES:
    raise UserError(f"family {name!r} is unknown; {nearest(name, FAMILIES)}")
  tried = [FAMILIES[name]] if name else [each for each in FAMILIES.values() if each.written]
  wrong = {each.name: misfits(each, config) for each in tried}
  for family in tried:
    if not wrong[family.name]:
      return family
  near = min(wrong, key=lambda each: len(wrong[each]))
  reasons = "; ".join(wrong[near][:3])
  raise UserError(f"no family of transformers holds this architecture; nearest {near}: {reasons}")


def half_layout(model: Model) -> tuple[ModelConfig, dict]:
  """Puts a model's rotary positions into half layout: the canonical config, and weights by path.

  Channels 2i and 2i + 1 of queries and keys become i and i + r/2, which leaves products unchanged.
  """
  leaves = tree.flatten(model.parameters)
  position, h = model.config.position, model.config.dims["h"]
  ordinary = not model.config.attention.latent.kv_rank
  if ordinary and position.kind == "rope" and position.layout == "interleaved":
    r = position.rotary_dim(h)
    order = np.concatenate([np.arange(0, r, 2), np.arange(1, r, 2), np.arange(r, h)])
    permuted = re.compile(r"/attention/(query|key)(_norm/scale)?_(bias_)?\w*h$")
    for path in filter(permuted.search, leaves):
      leaves[path] = np.asarray(leaves[path])[..., order]
  return canonical(model.config), leaves


def _token_ids(model: Model) -> dict:
  """The tokenizer's special ids. A decoder without one says null, where transformers would assume
  the ids of the published model, which a smaller vocabulary may not have."""
  ids = {}
  for name in ("bos", "eos", "pad"):
    number = getattr(model.tokenizer, f"{name}_id", None)
    if number is not None and 0 <= number < model.config.vocab_size:
      ids[f"{name}_token_id"] = number
    elif model.config.kind == "decoder":
      ids[f"{name}_token_id"] = None
  return ids
