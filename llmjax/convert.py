"""`convert`: any model that `load` reads, written as a Hugging Face folder or a checkpoint."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax

from llmjax.core.choices import check_choice
from llmjax.core.errors import UserError
from llmjax.core.files import check_writable
from llmjax.formats.hf import folder as hf
from llmjax.models.kinds import merged
from llmjax.models.model import Model
from llmjax.run import load
from llmjax.text.folder import save as save_tokenizer
from llmjax.text.tokenizer import affixes
from llmjax.training.stored import save_model

FORMATS = ("huggingface", "checkpoint")


def convert(
  source: str | Path,
  target: str | Path,
  format: str = "huggingface",
  dtype: str = "float32",
  family: str = "",
) -> dict:
  """Writes a model in another format, with its tokenizer and chat template.

  The target is written under a temporary name and renamed, so it is complete or absent.

  Args:
    source: anything `load` reads: a workdir, a checkpoint, a Hugging Face folder, a GGUF file.
    target: folder to write; must be empty or not exist.
    format: huggingface (config.json, safetensors, tokenizer files), or checkpoint (as in training,
      without an optimizer).
    dtype: of the tensors of a Hugging Face folder: float32, bfloat16 or float16.
    family: `model_type` of a Hugging Face folder; empty takes the first that fits.
  Returns:
    `family` (`llmjax` for a checkpoint), `parameters`, `bytes` on disk and `path`.
  Raises:
    UserError: nothing to read, a target that is not empty, or a model the format cannot represent.
  """
  check_choice("format", format, FORMATS)
  if format == "checkpoint" and (dtype != "float32" or family):
    raise UserError("a checkpoint is float32 and has no family: leave out --dtype and --family")
  check_choice("dtype", dtype, hf.DTYPES)
  check_writable("target", target)
  target = Path(target).expanduser().absolute()
  if target.exists() and any(target.iterdir()):
    raise UserError(f"{str(target)!r} exists and is not empty; convert writes a new folder")
  model = load(source)
  partial = target.with_name(f".{target.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    written = _write(model, partial, format, dtype, family)
    os.replace(partial, target)
  except OSError as error:
    raise UserError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return {
    "family": written,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.parameters)),
    "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
    "path": str(target),
  }


def _write(model: Model, folder: Path, format: str, dtype: str, family: str) -> str:
  folder.parent.mkdir(parents=True, exist_ok=True)
  if format == "checkpoint":
    save_model(model, folder)
    return "llmjax"
  plain = dataclasses.replace(model.config, weights=())
  model = dataclasses.replace(model, config=plain, parameters=merged(model.parameters))
  hf.save_folder(model, folder, dtype, family)
  if model.tokenizer is not None:
    save_tokenizer(model.tokenizer, folder, affixes(model.tokenizer, model.config.kind))
  return hf.choose(model.config, family).name
