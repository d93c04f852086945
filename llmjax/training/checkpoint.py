"""The checkpoints of a run: saved in the background, restored onto any mesh, newest first. A
checkpoint that cannot be read, or does not match its checksums, is reported; the one before is
used."""

import contextlib
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from llmjax.core.errors import RunFailed, note
from llmjax.parallel import multihost
from llmjax.training.parameters import TrainState
from llmjax.training.stored import FOLDER, items, read_newest, reason_of


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
    """Writes a checkpoint of the state's step in the background, or waits until it is on disk.

    Raises:
      RunFailed: the state is not finite, or the checkpoint before could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    model = state.trainable | state.frozen
    args = items(meta | {"step": step}, model=model, optimizer=state.optimizer)
    with _failing():
      self._manager.save(step, args=args)
      if wait:
        self._manager.wait_until_finished()

  def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
    """Reads the newest complete checkpoint onto the shardings of `like`.

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
    trees = {"model": like.trainable | like.frozen, "optimizer": like.optimizer}
    number, meta, trees = read_newest(folders, self._root, lambda meta: trees, multihost.agree)
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
      note(f"moved {len(folders)} of them to {damaged}", "warning")
    multihost.barrier("damaged")
    self._manager.reload()

  def close(self):
    """Waits until everything is on disk.

    Raises:
      RunFailed: it could not be written.
    """
    with _failing():
      self._manager.wait_until_finished()
    self._manager.close()

  def standing(self) -> str:
    """Tells which checkpoint a failed run resumes from, after writing what can be written."""
    with contextlib.suppress(RunFailed):
      self.close()
    if multihost.is_writer():  # the disk may be full
      for partial in self._root.glob("*-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
    steps = self._manager.all_steps(read=True)
    return f"the checkpoint of step {max(steps)} stands" if steps else "there is no checkpoint yet"


@contextlib.contextmanager
def _failing():
  try:
    yield
  except Exception as error:
    raise RunFailed(f"a checkpoint could not be written ({reason_of(error)})") from error
