"""Checkpoints: Orbax writes path → array in the background, beside all that made the run.

A checkpoint folder holds three items: `model` and `optimizer` (arrays by path) and `meta` (config
and its hash, tokenizer, data key, seed, step, checksums of all arrays and of itself), so it can be
moved and loaded alone. A folder that cannot be read, or holds something else than was saved, is
said out loud and the one before is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from llmjax.core import tree
from llmjax.core.config import config_hash, freeze, to_dict
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
from llmjax.training.parameters import TrainState

# Orbax narrates every save at WARNING, and what fails at ERROR with every traceback; it raises too.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
_unraisable = sys.unraisablehook


def _spare_callbacks(raised):
  """`sys.unraisablehook`, without what Orbax and TensorStore leave when a save or a read failed."""
  frames = traceback.extract_tb(raised.exc_traceback)
  ours = any("/orbax/" in frame.filename for frame in frames)
  if not ours and str(raised.exc_value) != "Event loop is closed":
    _unraisable(raised)


sys.unraisablehook = _spare_callbacks

FOLDER = "checkpoints"
# What a model's folder may say of its use, by the name of the `Model`'s attribute.
_BESIDE = {"pooling": Pooling, "processor": Processor}
_SUMS = "checksums"
# What `meta` holds beside `checksums`, which older checkpoints lack.
_META = {"config", "config_hash", "seed", "data_key", "tokenizer", "step", "train_seconds"}


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: folder of the run.
    keep: newest checkpoints that stay.
  """

  def __init__(self, workdir: Path, keep: int):
    self._root = Path(workdir, FOLDER).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(
      self._root, options=options, item_names=("model", "optimizer", "meta")
    )

  def save(self, state: TrainState, meta: dict, wait: bool = False):
    """Starts writing a checkpoint of the state's step; returns before it is on disk, unless asked
    to wait.

    Raises:
      RunFailed: the state is not finite, or the checkpoint before could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = _items(
      meta | {"step": step}, model=state.trainable | state.frozen, optimizer=state.optimizer
    )
    with _written():
      self._manager.save(step, args=items)
      if wait:
        self._manager.wait_until_finished()

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """Reads the newest whole checkpoint onto the shardings of `like`.

    Args:
      like: description of the state, with shardings; any mesh.
    Returns:
      (state, meta), or None where there is no checkpoint.
    Raises:
      UserError: there are checkpoints and none can be read.
    """
    folders = [self._root / str(step) for step in sorted(self._manager.all_steps(), reverse=True)]
    if not folders:
      return None

    parts = {"model": like.trainable | like.frozen, "optimizer": like.optimizer}
    number, meta, trees = _newest_whole(folders, self._root, lambda meta: parts, multihost.agree)
    self._move_aside(folders[:number])
    step = jax.device_put(jax.numpy.int32(int(folders[number].name)), like.step.sharding)
    trainable, frozen = (
      {path: trees["model"][path] for path in some} for some in (like.trainable, like.frozen)
    )
    return TrainState(step, trainable, frozen, trees["optimizer"]), meta

  def _move_aside(self, folders: list[Path]):
    """Moves unreadable checkpoints to `damaged/`, so that their steps can be saved again."""
    if not folders:
      return
    if multihost.is_writer():
      damaged = self._root.parent / "damaged"
      damaged.mkdir(exist_ok=True)
      for folder in folders:
        folder.rename(damaged / f"{folder.name}-{len(list(damaged.iterdir()))}")
      _warn(f"moved {len(folders)} of them to {damaged}")
    multihost.barrier("damaged")
    self._manager.reload()

  def close(self):
    """Waits until everything is on disk.

    Raises:
      RunFailed: it could not be written.
    """
    with _written():
      self._manager.wait_until_finished()
    self._manager.close()

  def standing(self) -> str:
    """Says which checkpoint a run that failed goes on from, when all that can be is on disk."""
    with contextlib.suppress(RunFailed):
      self.close()
    if multihost.is_writer():  # what was begun takes room, on a disk that may be full
      for partial in self._root.glob("*-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
    steps = self._manager.all_steps(read=True)
    return f"the checkpoint of step {max(steps)} stands" if steps else "there is no checkpoint yet"


@contextlib.contextmanager
def _written():
  """Says in one sentence what Orbax failed of."""
  try:
    yield
  except Exception as error:
    raise RunFailed(f"a checkpoint could not be written ({_reason(error)})") from error


def _reason(error: Exception) -> str:
  return full_disk(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def make_meta(config: Config, tokenizer: Tokenizer | None, data_key: str) -> dict:
  """Gathers what a checkpoint says of its run; the step is added when it is saved.

  Data state and random state are functions of (seed, step), so these two numbers are all of both.
  """
  return {
    "config": to_dict(config),
    "config_hash": config_hash(config),
    "seed": config.seed,
    "data_key": data_key,
    "tokenizer": None if tokenizer is None else to_state(tokenizer),
  }


def save_model(model: Model, folder: Path):
  """Writes a model as a checkpoint that training did not make: no optimizer, no text, step 0.

  Args:
    model: with or without a tokenizer.
    folder: of the checkpoint; must not exist.
  """
  config = Config(model=model.config, data=DataConfig(sources=""))
  meta = make_meta(config, model.tokenizer, "") | {"step": 0}
  beside = {name: getattr(model, name) for name in _BESIDE}
  meta |= {name: dataclasses.asdict(value) for name, value in beside.items() if value is not None}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(Path(folder).absolute(), _items(meta, model=model.parameters))


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
  """Hashes all of `meta` but its own hash: 16 hex digits."""
  sums = {name: value for name, value in meta[_SUMS].items() if name != "meta"}
  text = json.dumps(meta | {_SUMS: sums}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def newest_meta(workdir: Path) -> dict | None:
  """Reads the `meta` of a workdir's newest checkpoint that has one whole, or None without any."""
  # A save that was cut off leaves a folder with more than a number for its name.
  if not any(path.name.isdigit() for path in Path(workdir, FOLDER).glob("*")):
    return None
  for folder in _candidates(Path(workdir)):
    try:
      return read_meta(folder)
    except (OSError, ValueError):
      continue  # said out loud when the state is restored
  raise UserError(f"none of the checkpoints in {str(workdir)!r} can be read")


def load_model(path: str | Path) -> tuple[Model, dict]:
  """Loads a trained model from a workdir (its newest whole checkpoint) or a checkpoint folder.

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

  _, meta, trees = _newest_whole(_candidates(Path(path)), path, like)
  tokenizer = from_state(meta["tokenizer"]) if meta["tokenizer"] else None
  beside = {name: kind(**meta[name]) for name, kind in _BESIDE.items() if name in meta}
  return Model(_model_config(meta), trees["model"], tokenizer, **beside), meta


def _model_config(meta: dict) -> ModelConfig:
  return freeze(meta["config"]["model"], ModelConfig, "model.")


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


def _newest_whole(
  folders: list[Path], place: str | Path, like: Callable, agree: Callable = lambda failed: failed
):
  """Reads the first checkpoint that is whole: (its number in the list, meta, trees by name).

  Args:
    folders: checkpoints.
    place: of them all, for messages.
    like: of a checkpoint's meta, descriptions of the trees that are wanted.
    agree: tells whether any process failed to read, where several read together.
  Raises:
    UserError: none of them can be read, or one says what is wrong with it.
  """
  for number, folder in enumerate(folders):
    reason = ""
    try:
      meta = read_meta(folder)
      trees = {name: _read(folder / name, part) for name, part in like(meta).items()}
    except UserError:
      raise
    except Exception as error:
      reason = _reason(error)
    if agree(bool(reason)):
      reason = reason or "another process could not read it"
    elif not (reason := _mismatch(meta, trees, folder)):
      return number, meta, trees
    _warn(f"checkpoint {folder} cannot be read ({reason}); trying the one before")
  raise UserError(f"none of the {len(folders)} checkpoints in {str(place)!r} can be read")


def _mismatch(meta: dict, trees: dict, folder: Path) -> str:
  """Says which array is not the one that was saved; nothing if all are."""
  if _SUMS not in meta:
    _warn(f"checkpoint {folder} has no checksums, as older ones; its arrays are taken as they are")
    return ""
  for name, made in trees.items():
    found = checksums(tree.flatten(made))[0]
    for path, value in meta[_SUMS][name].items():
      if found[path] != value:
        return f"the checksum of {name} {path} does not match"
  return ""


def _warn(text: str):
  if multihost.is_writer():
    print(f"llmjax: warning: {text}", file=sys.stderr)


def _items(meta: dict, **trees) -> ocp.args.Composite:
  """What a checkpoint holds, as Orbax wants it told, checksums among its meta.

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
