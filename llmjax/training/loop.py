"""The training loop, top to bottom: restore or make the state, step, report, checkpoint."""

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from llmjax.core.errors import RunFailed, UserError
from llmjax.core.memory import give_back, settle
from llmjax.data.loader import batches
from llmjax.data.pack import PackedRows
from llmjax.data.prepare import TokenStore
from llmjax.models.formulas import forward_flops_per_token
from llmjax.parallel import multihost
from llmjax.parallel.rules import batch_sharding
from llmjax.text.tokenizer import Tokenizer
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.config import Config
from llmjax.training.executable import make_step
from llmjax.training.finite import NotFinite, Watch
from llmjax.training.metrics import NoReport, Reporter
from llmjax.training.optimizers import started_from
from llmjax.training.page import write_page
from llmjax.training.parameters import TrainState, abstract_state, init_sharded, model_of, split
from llmjax.training.rates import peak_of
from llmjax.training.stored import check_text, make_meta

_LARGE_BYTES = 2_000_000  # of metrics.jsonl: more than 0.1 s to make a page of


class Interrupted(KeyboardInterrupt):
  """The user stopped the run; its state is on disk."""


def fit(
  config: Config,
  workdir: Path,
  tokenizer: Tokenizer,
  store: TokenStore,
  mesh: Mesh,
  evaluate: Callable[[nnx.Module], dict] = lambda model: {},
  begin: Callable[[nnx.Module], nnx.Module] = lambda fresh: fresh,
  name: Callable[[int], str] = str,
) -> tuple[nnx.Module, float]:
  """Trains a model, resuming from the newest checkpoint of the workdir.

  Args:
    config: the experiment, `model.vocab_size` filled in.
    tokenizer: kept in every checkpoint.
    store: training documents.
    evaluate: called on the model every `eval.every` steps; its values are logged.
    begin: called on the model of step 0; returns the model to train.
    name: gives the name of a training document by its number in `store`.
  Returns:
    (the trained model, seconds in the loop, all sessions of the run added up).
  Raises:
    UserError: the checkpoint is of other text, or the mesh does not divide the model.
    Interrupted: SIGINT or SIGTERM came; the step under way was finished and saved.
    RunFailed: a loss, a gradient or the state is not finite, or a file could not be written.
  """
  steps, train_step = config.train.steps, make_step(config, mesh)
  meta = make_meta(config, tokenizer, store.key)
  checkpoints = Checkpoints(workdir, config.checkpoint.keep)
  state, start, spent_s = _start(checkpoints, config, mesh, meta, begin)
  rows = PackedRows(store, config.model.max_seq_len, config.seed)
  feed = batches(
    rows, config.task_of(tokenizer), batch_sharding(mesh), config.data.batch_size, start, steps,
    seed=config.seed,
  )
  watch = Watch(rows, config.data.batch_size, name)
  report = _reporter(config, workdir, start)
  votes = multihost.Votes()
  began_s = time.perf_counter() - spent_s

  with jax.set_mesh(mesh), _Signals() as stop, _failing(checkpoints, report):
    for step, batch in enumerate(report.feed(feed), start + 1):
      state, metrics = train_step(state, batch)
      settle(state)
      if step == start + 1:
        give_back()  # memory of initializing or loading the state
      watch.add(step, metrics)
      report.add(step, metrics)
      if config.eval.every and step % config.eval.every == 0 and step < steps:
        model = model_of(state, config)
        report.record(step, "evaluation", functools.partial(evaluate, model))
        give_back()
      # Asked once a step: a signal must not come between saving and leaving.
      stopping = votes.add(stop.asked)
      if step % config.checkpoint.every == 0 or step == steps or stopping:
        watch.flush()  # no state after a step that is not finite may be saved
        saved = meta | {"train_seconds": time.perf_counter() - began_s}
        last = stopping or step == steps
        # After all lines of metrics: a run that resumes from here must not lack one before it.
        save = functools.partial(_save, checkpoints, state, saved, last, workdir, config)
        report.record(step, "checkpoint", save)
      if stopping:
        break
    jax.block_until_ready(state)
    train_s = time.perf_counter() - began_s
    report.close()
    checkpoints.close()
  if multihost.agree(stop.asked):
    raise Interrupted(f"stopped after step {int(state.step)} of {steps}")
  return model_of(state, config), train_s


def _save(checkpoints: Checkpoints, state, meta: dict, last: bool, workdir: Path, config: Config):
  """Saves a checkpoint, and the page of the run where reading its metrics takes no time."""
  checkpoints.save(state, meta, last)
  metrics = workdir / "metrics.jsonl"
  if multihost.is_writer() and metrics.stat().st_size < _LARGE_BYTES:
    with contextlib.suppress(UserError):  # a damaged file of an earlier session
      write_page(workdir, config)


@contextlib.contextmanager
def _failing(checkpoints: Checkpoints, report):
  """Closes the files of a run that failed, and adds what it can resume from to the message."""
  try:
    yield
  except (RunFailed, OSError) as error:
    with contextlib.suppress(OSError):
      report.stop(error.step if isinstance(error, NotFinite) else 0)
    text = f"a file could not be written: {error}" if isinstance(error, OSError) else error
    raise RunFailed(f"{text}; {checkpoints.standing()}") from error


def _start(checkpoints, config, mesh, meta, begin):
  """Returns (state, steps done, seconds spent), restored or of step 0."""
  restored = checkpoints.restore(abstract_state(config, mesh))
  if restored is None:
    state = init_sharded(config, mesh)
    trainable, frozen = split(begin(model_of(state, config)), config.optim.groups)
    optimizer = started_from(state.optimizer, trainable)
    return TrainState(state.step, trainable, frozen, optimizer), 0, 0.0
  state, found = restored
  check_text(found, meta["data_key"])
  step = int(state.step)
  if step > config.train.steps:
    raise UserError(f"the run is at step {step}, beyond train.steps {config.train.steps}")
  multihost.say(f"going on from step {step}")
  return state, step, found["train_seconds"]


def _reporter(config: Config, workdir: Path, start: int):
  length = config.model.max_seq_len
  flops = 3 * config.data.batch_size * length * forward_flops_per_token(config.model, length)
  peak = peak_of(config.model.dtype)  # if it is measured, by all processes at the same time
  if not multihost.is_writer():
    return NoReport()
  steps, every = config.train.steps, config.train.log_every
  return Reporter(workdir, steps, start, every, flops, peak)


class _Signals:
  """Makes the first SIGINT or SIGTERM a request to stop; a second one stops at once."""

  def __enter__(self):
    self.asked = False
    self._before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
      try:
        self._before[number] = signal.signal(number, self._ask)
      except ValueError:  # not the main thread, as in a notebook server: leave signals alone
        break
    return self

  def _ask(self, number, frame):
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True
    multihost.say("\nstopping: saving a checkpoint (again to stop at once)")

  def __exit__(self, *error):
    for number, handler in self._before.items():
      signal.signal(number, handler)
