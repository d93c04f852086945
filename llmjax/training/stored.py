"""What a checkpoint folder holds: `model` and `optimizer`, arrays by path, and `meta`. `meta` has
the config and its hash, tokenizer, data key, seed, step, and checksums of all arrays and of itself,
so that a folder can be moved and loaded alone."""

import dataclasses
import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from llmjax.core import tree
from llmjax.core.config import config_hash, freeze, with_new_names
from llmjax.core.errors import RunFailed, UserError
from llmjax.core.files import check_exists, full_disk
from llmjax.data.loader import DataConfig
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.models.pooling import Pooling
from llmjax.models.processor import Processor
from llmjax.parallel import multihost
from llmjax.text.tokenizer import Tokenizer, from_state, to_state
from llmjax.training.checksum import checksums
from llmjax.training.config import Config

# Orbax logs every save as a warning, and what it raises with every traceback.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
_unraisable = sys.unraisablehook


def _spare_callbacks(raised):
  """`sys.unraisablehook`, without the callbacks of Orbax and TensorStore after a failure."""
  frames = traceback.extract_tb(raised.exc_traceback)
  of_orbax = any("/orbax/" in frame.filename for frame in frames)
  if not of_orbax and str(raised.exc_value) != "Event loop is closed":
    _unraisable(raised)


sys.unraisablehook = _spare_callbacks

FOLDER = "checkpoints"
# Attributes of a `Model` that `meta` may hold.
_ATTRIBUTES = {"pooling": Pooling, "processor": Processor}
_SUMS = "checksums"
# Keys of `meta` in checkpoints older than checksums.
_META = {"config", "config_hash", "seed", "data_key", "tokenizer", "step", "train_seconds"}


def make_meta(config: Config, tokenizer: Tokenizer | None, data_key: str) -> dict:
  """Describes a run; the step is added when a checkpoint is saved.

  The states of data and of PRNGs are functions of (seed, step).
  """
  return {
    "config": dataclasses.asdict(config), "config_hash": config_hash(config), "seed": config.seed,
    "data_key": data_key, "tokenizer": None if tokenizer is None else to_state(tokenizer),
  }


def check_text(meta: dict, data_key: str):
  """Raises a `UserError` if the run of a checkpoint's `meta` has other training text."""
  if meta["data_key"] != data_key:
    raise UserError(
      f"the training text or tokenizer changed since this run began (data {meta['data_key']} "
      f"then, {data_key} now); use another --workdir, or bring the text back"
    )


def save_model(model: Model, folder: Path):
  """Writes a model as a checkpoint without optimizer and text, of step 0.

  Args:
    folder: of the checkpoint; must not exist.
  """
  config = Config(model=model.config, data=DataConfig(sources=""))
  meta = make_meta(config, model.tokenizer, "") | {"step": 0}
  values = {name: getattr(model, name) for name in _ATTRIBUTES}
  meta |= {name: dataclasses.asdict(value) for name, value in values.items() if value is not None}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(Path(folder).absolute(), items(meta, model=model.parameters))


def read_meta(folder: Path) -> dict:
  """Reads a checkpoint's `meta`.

  Raises:
    OSError, ValueError: it is not there, or not what was saved.
  """
  meta = json.loads((folder / "meta" / "metadata").read_text())
  if _SUMS in meta:
    sums = meta[_SUMS]
    if sums.get("meta") != _digest(meta):
      raise ValueError("the checksum of meta does not match")
  elif unknown := sorted(meta.keys() - _META):
    raise ValueError(f"there is no {unknown[0]!r} in meta")
  return meta


def _digest(meta: dict) -> str:
  sums = {name: value for name, value in meta[_SUMS].items() if name != "meta"}
  text = json.dumps(meta | {_SUMS: sums}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def newest_meta(workdir: Path) -> dict | None:
  """Reads the `meta` of a workdir's newest checkpoint with a complete one; None without any."""
  # A save that was cut off leaves a folder with more than a number for its name.
  if not any(path.name.isdigit() for path in Path(workdir, FOLDER).glob("*")):
    return None
  for folder in _candidates(Path(workdir)):
    try:
      return read_meta(folder)
    except (OSError, ValueError):
      continue  # reported when the state is restored
  raise UserError(f"none of the checkpoints in {str(workdir)!r} can be read")


def load_model(path: str | Path) -> tuple[Model, dict]:
  """Loads a trained model from a workdir (its newest complete checkpoint) or a checkpoint folder.

  Args:
    path: workdir, its `checkpoints` folder, or one checkpoint.
  Returns:
    (model on the first local device, meta).
  Raises:
    UserError: no such folder, no checkpoint in it, or none that can be read.
  """

  def like(meta):
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    described = abstract(_model_config(meta))
    return {"model": jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), described
    )}

  _, meta, trees = read_newest(_candidates(Path(path)), path, like)
  tokenizer = from_state(meta["tokenizer"]) if meta["tokenizer"] else None
  values = {name: kind(**meta[name]) for name, kind in _ATTRIBUTES.items() if name in meta}
  return Model(_model_config(meta), trees["model"], tokenizer, **values), meta


def _model_config(meta: dict) -> ModelConfig:
  return freeze(with_new_names(meta["config"]["model"], "model."), ModelConfig, "model.")


def _candidates(path: Path) -> list[Path]:
  path = path.expanduser().absolute()
  check_exists("checkpoint", path, "folder")
  if (path / "meta").is_dir():
    return [path]
  root = path / FOLDER if (path / FOLDER).is_dir() else path
  steps = sorted((int(p.name) for p in root.iterdir() if p.name.isdigit()), reverse=True)
  if not steps:
    raise UserError(f"there is no checkpoint in {str(path)!r}")
  return [root / str(step) for step in steps]


def read_newest(
  folders: list[Path], parent: str | Path, like: Callable, agree: Callable = lambda failed: failed
):
  """Reads the first checkpoint that is complete: (its number in the list, meta, trees by name).

  Args:
    like: meta → descriptions of the trees to read, by name.
    agree: whether any process failed to read, where several read together.
  Raises:
    UserError: none of them can be read, or `like` raised it.
  """
  for number, folder in enumerate(folders):
    reason = ""
    try:
      meta = read_meta(folder)
      trees = {name: _read(folder / name, one) for name, one in like(meta).items()}
    except UserError:
      raise
    except Exception as error:
      reason = reason_of(error)
    if agree(bool(reason)):
      reason = reason or "another process could not read it"
    elif not (reason := _mismatch(meta, trees, folder)):
      return number, meta, trees
    multihost.say(
      f"llmjax: warning: checkpoint {folder} cannot be read ({reason}); trying the one before"
    )
  raise UserError(f"none of the {len(folders)} checkpoints in {str(parent)!r} can be read")


def _mismatch(meta: dict, trees: dict, folder: Path) -> str:
  """Names an array that is not the one that was saved; "" if there is none."""
  if _SUMS not in meta:
    text = f"checkpoint {folder} has no checksums, as older ones; its arrays are taken as they are"
    multihost.say(f"llmjax: warning: {text}")
    return ""
  for name, arrays in trees.items():
    found = checksums(tree.flatten(arrays))[0]
    for path, value in meta[_SUMS][name].items():
      if found[path] != value:
        return f"the checksum of {name} {path} does not match"
  return ""


def reason_of(error: Exception) -> str:
  """Describes an exception of Orbax in half a line."""
  return full_disk(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def items(meta: dict, **trees) -> ocp.args.Composite:
  """Puts a checkpoint's items together for Orbax, with checksums in its meta.

  Raises:
    RunFailed: a number is not finite.
  """
  arrays = {name: tree.flatten(value) for name, value in trees.items()}
  sums = {}
  for name, leaves in arrays.items():
    sums[name], wrong = checksums(leaves)
    if wrong:
      raise RunFailed(f"step {meta['step']} left {name} {wrong[0]} with values that are not finite")
  meta = json.loads(json.dumps(meta | {_SUMS: sums}))
  meta[_SUMS]["meta"] = _digest(meta)
  arrays = {name: ocp.args.StandardSave(leaves) for name, leaves in arrays.items()}
  return ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)


def _read(folder: Path, like):
  with ocp.StandardCheckpointer() as reader:
    return tree.unflatten(like, reader.restore(folder, tree.flatten(like)))
