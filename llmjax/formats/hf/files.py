"""The files of a Hugging Face folder: JSON, and safetensors in one file or in shards."""

import functools
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmjax.core.errors import UserError
from llmjax.core.files import read_json, write_json
from llmjax.formats.hf.layout import Tensors

DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
SHARD_BYTES = 5_000_000_000


def open_tensors(path: Path, aliases: tuple = ()) -> Tensors:
  """Opens a folder's tensors under their usual names, which `aliases` (pattern, replacement) make.

  Raises:
    UserError: a file is missing or damaged.
  """
  readers = {}
  for file in _tensor_files(path):
    try:
      opened = safe_open(file, "np")
    except (SafetensorError, OSError) as error:
      raise UserError(f"{file} cannot be read as safetensors: {error}") from error
    for spelled in opened.keys():  # noqa: SIM118
      name = spelled
      for pattern, usual in aliases:
        name = re.sub(pattern, usual, name)
      readers[name] = functools.partial(_read_tensor, opened, spelled)
  return Tensors(readers)


def _read_tensor(opened, name: str) -> np.ndarray:
  try:
    array = opened.get_tensor(name)
  except (SafetensorError, TypeError, AttributeError) as error:
    raise UserError(f"tensor {name!r} cannot be read: {error}") from error
  if array.dtype.name not in (*DTYPES, "float64"):
    raise UserError(f"tensor {name!r} is of {array.dtype.name}; known: {', '.join(DTYPES)}")
  return array


def _tensor_files(path: Path) -> list[Path]:
  if (path / "model.safetensors").is_file():
    return [path / "model.safetensors"]
  index = path / "model.safetensors.index.json"
  if index.is_file():
    files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    for file in files:
      if not file.is_file():
        raise UserError(f"{index} names {file.name}, which is not there")
    return files
  found = sorted(path.glob("*.safetensors"))
  if found:
    return found
  for file in (*path.glob("*.bin"), *path.glob("*.pt*"), *path.glob("*.h5")):
    raise UserError(
      f"{path} holds {file.name}, which can run code and is not opened; save it as safetensors"
    )
  raise UserError(f"{path} has a config.json but no safetensors")


def save_tensors(tensors: dict, path: Path):
  """Writes one file, or shards and their index where it would be too large."""
  shards, size = [{}], 0
  for name, array in tensors.items():
    if shards[-1] and size + array.nbytes > SHARD_BYTES:
      shards.append({})
      size = 0
    shards[-1][name] = array
    size += array.nbytes
  for old in path.glob("model*.safetensors*"):
    old.unlink()
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
    name = f"model{suffix}.safetensors"
    # safetensors replaces the file by one that its owner alone may read.
    (path / name).touch()
    mode = (path / name).stat().st_mode
    save_file(shard, path / name, metadata={"format": "pt"})
    (path / name).chmod(mode)
    weight_map |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)
