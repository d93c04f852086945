"""Checkpoints: Orbax writes path → array in the background, beside all that made the run.

A checkpoint folder holds three items: `model` and `optimizer` (arrays by path) and `meta` (config
and its hash, tokenizer, data key, seed, step), so it can be moved and loaded alone. A folder that
cannot be read is said out loud and the one before is used.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from llmjax.core import tree
from llmjax.core.config import config_hash, freeze, to_dict
from llmjax.core.errors import UserError
from llmjax.data.loader import DataConfig
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.models.pooling import Pooling
from llmjax.parallel import multihost
from llmjax.text.tokenizer import Tokenizer, from_state, to_state
from llmjax.train.config import Config
from llmjax.train.state import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at WARNING

FOLDER = "checkpoints"
# What a model's folder may say of its use, by the name of the `Model`'s attribute.
_BESIDE = {"pooling": Pooling}


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
    to wait."""
    step = int(state.step)
    if step not in self._manager.all_steps():
      items = _items(meta | {"step": step}, model=state.model, optimizer=state.optimizer)
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

    def read(folder):
      meta = read_meta(folder)
      made = TrainState(
        step=jax.device_put(jax.numpy.int32(int(folder.name)), like.step.sharding),
        model=_read(folder / "model", like.model),
        optimizer=_read(folder / "optimizer", like.optimizer),
      )
      return made, meta

    number, found = _newest_whole(folders, self._root, read)
    self._move_aside(folders[:number])
    return found

  def _move_aside(self, folders: list[Path]):
    """Moves unreadable checkpoints to `damaged/`, so that their steps can be saved again."""
    if not folders:
      return
    if multihost.is_writer():
      damaged = self._root.parent / "damaged"
      damaged.mkdir(exist_ok=True)
      for folder in folders:
        folder.rename(damaged / f"{folder.name}-{len(list(damaged.iterdir()))}")
      print(f"llmjax: warning: moved {len(folders)} of them to {damaged}", file=sys.stderr)
    multihost.barrier("damaged")
    self._manager.reload()

  def close(self):
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


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
  """Reads a checkpoint's `meta`."""
  return json.loads((folder / "meta" / "metadata").read_text())


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

  def read(folder):
    meta = read_meta(folder)
    return _build(folder, meta), meta

  return _newest_whole(_candidates(Path(path)), path, read)[1]


def _build(folder: Path, meta: dict) -> Model:
  config = freeze(meta["config"]["model"], ModelConfig, "model.")
  like = abstract(config)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
  tokenizer = from_state(meta["tokenizer"]) if meta["tokenizer"] else None
  beside = {name: kind(**meta[name]) for name, kind in _BESIDE.items() if name in meta}
  return Model(config, _read(folder / "model", like), tokenizer, **beside)


def _candidates(path: Path) -> list[Path]:
  path = path.expanduser().absolute()
  if not path.is_dir():
    raise UserError(f"checkpoint {str(path)!r} does not exist")
  if (path / "meta").is_dir():
    return [path]
  root = path / FOLDER if (path / FOLDER).is_dir() else path
  steps = sorted((int(p.name) for p in root.iterdir() if p.name.isdigit()), reverse=True)
  if not steps:
    raise UserError(f"there is no checkpoint in {str(path)!r}")
  return [root / str(step) for step in steps]


def _newest_whole(folders: list[Path], place: str | Path, read: Callable):
  """Reads the first checkpoint that can be: (its number in the list, what `read` returns).

  Raises:
    UserError: none of them can be read, or one says what is wrong with it.
  """
  for number, folder in enumerate(folders):
    try:
      return number, read(folder)
    except UserError:
      raise
    except Exception as error:
      reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
      text = f"checkpoint {folder} cannot be read ({reason}); trying the one before"
      if multihost.is_writer():
        print(f"llmjax: warning: {text}", file=sys.stderr)
  raise UserError(f"none of the {len(folders)} checkpoints in {str(place)!r} can be read")


def _items(meta: dict, **trees) -> ocp.args.Composite:
  """What a checkpoint holds, as Orbax wants it told."""
  arrays = {name: ocp.args.StandardSave(tree.flatten(value)) for name, value in trees.items()}
  return ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)


def _read(folder: Path, like):
  with ocp.StandardCheckpointer() as reader:
    return tree.unflatten(like, reader.restore(folder, tree.flatten(like)))
