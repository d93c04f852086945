"""The public functions `train`, `load` and `evaluate`; each returns plain values."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from llmjax.core import config as configs
from llmjax.core import files
from llmjax.core.errors import UserError
from llmjax.core.lock import locked
from llmjax.data.loader import DataConfig, make_store, make_tokenizer, read_all, read_split
from llmjax.data.prepare import composition_of, prepare, store_key
from llmjax.eval.loss import compressor_bits_per_byte, evaluate_loss
from llmjax.formats.gguf import file as gguf
from llmjax.formats.hf import folder as hf
from llmjax.model import Model
from llmjax.models import build
from llmjax.models.config import ModelConfig
from llmjax.models.upcycle import init_from
from llmjax.parallel import multihost
from llmjax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh
from llmjax.parallel.rules import weight_shardings
from llmjax.serve.generate import generate
from llmjax.serve.prompt import encode_prompts
from llmjax.serve.sample import Sampling
from llmjax.text.report import report
from llmjax.text.tokenizer import from_state, to_state
from llmjax.training.config import Config, binding
from llmjax.training.loop import fit
from llmjax.training.metrics import rates, read_metrics
from llmjax.training.page import write_page
from llmjax.training.plot import levels, plot_experts, plot_loss
from llmjax.training.runnable import check_config, check_run, with_vocab
from llmjax.training.schedules import check_schedule
from llmjax.training.stored import load_model, newest_meta

_REPORTED = 1000  # held-out documents that the tokenizer is measured on
EVAL_KEYS = (
  "data.sources", "data.text_field", "data.not_text", "data.cache", "eval.batch_size",
  "eval.stride",
)


def train(config, workdir: str | Path) -> dict:
  """Runs or resumes an experiment: tokenizer, data, training, held-out evaluation, samples.

  Writes `data/`, `data.json`, `checkpoints/` (each with config and tokenizer), `metrics.jsonl`,
  `tensorboard/`, `loss.png`, `samples.txt`, `result.json` and `report.html` into the workdir.

  Args:
    config: the experiment, frozen (`Config`) or as `get_config()` returns it.
    workdir: folder of the run, created if it is missing.
  Returns:
    The content of `result.json`: `nats_per_token`, `bits_per_byte` (language models only),
    `gzip_bits_per_byte`, `xz_bits_per_byte`, `train_seconds` and where that time went
    (`training.metrics.rates`), `steps`, `parameters`, `tokenizer` (`text.report`) and more.
  Raises:
    UserError: an ordinary mistake, or another run in the workdir, which loses nothing.
    Interrupted: stopped by the user, after a checkpoint was saved.
    RunFailed: the loss or a gradient is not finite, or a file could not be written.
  """
  workdir = Path(workdir)
  config = configs.frozen(config, Config)
  _check_paths(config, workdir)
  with files.report_full_disk(), contextlib.ExitStack() as held:
    multihost.from_writer(lambda: held.enter_context(locked(workdir)))
    return _train(config, workdir)


def _train(config: Config, workdir: Path) -> dict:
  began_s = time.perf_counter()
  mesh = make_mesh(config.mesh)
  meta = multihost.from_writer(lambda: newest_meta(workdir))
  config = _check_run(config, workdir, mesh, meta)
  multihost.say(f"reading text: {config.data.sources}")
  documents, held_out = read_split(config.data)
  state = meta and meta["tokenizer"]
  tokenizer = from_state(
    state or multihost.from_writer(lambda: to_state(_tokenizer(config, documents)))
  )
  store = make_store(config.data, documents, tokenizer, workdir)
  held_store = make_store(config.data, held_out, tokenizer, workdir)
  composition = [
    *composition_of("training", documents, store),
    *composition_of("held out", held_out, held_store),
  ]
  multihost.from_writer(
    lambda: files.replace(workdir / "data.json", files.to_json(composition, indent=1) + "\n")
  )
  task = config.task_of(tokenizer)
  config = with_vocab(config, tokenizer)
  windows = task.windows(config.model.max_seq_len)
  if windows > 1:
    multihost.say(
      f"llmjax: note: {len(task.marks)} sentinels are too few for {config.model.max_seq_len} "
      f"positions, so that each row is corrupted in {windows} separate windows"
    )
  samples = config.model.kind == "decoder"
  if samples:  # an error here is better than one at the end
    encode_prompts(config.model, tokenizer, config.sample.prompts)
  _sampling(config)
  multihost.say(
    f"{build.count_parameters(config.model):,} parameters, {len(store):,} documents, "
    f"{int(store.lengths.sum()):,} tokens of {store.size_bytes / store.lengths.sum():.2f} bytes; "
    f"held out: {held_store.size_bytes:,} bytes in {len(held_store):,} documents"
  )

  def evaluate(model, show=False):
    size, stride = config.eval.batch_size, config.eval.stride
    return evaluate_loss(model, held_store, mesh, task, size, stride, show)

  model, train_s = fit(
    config, workdir, tokenizer, store, mesh, evaluate, functools.partial(_initial, config),
    lambda i: documents[i].path,
  )
  multihost.say("evaluating on held-out text")
  scores = evaluate(model, show=True)
  if samples:
    model = multihost.to_writer(model)

  def finish():
    return _finish(config, workdir, tokenizer, held_out, model, train_s, scores, began_s)

  return multihost.from_writer(finish)


def check_start(config: Config, workdir: str | Path, devices: int):
  """Checks whether a run could start or resume, before anything is read or started.

  Args:
    config: the experiment.
    workdir: folder of the run.
    devices: number of devices, which need not be present.
  Raises:
    UserError: what is wrong, in one sentence.
  """
  _check_paths(config, workdir)
  mesh = abstract_mesh(config.mesh, devices)
  _check_run(config, workdir, mesh, newest_meta(Path(workdir)))


def _check_paths(config: Config, workdir: str | Path):
  files.check_writable("workdir", workdir)
  if config.data.cache:
    files.check_writable("data.cache", config.data.cache)
  if config.init.checkpoint and not Path(config.init.checkpoint).expanduser().exists():
    raise UserError(f"init.checkpoint {config.init.checkpoint!r} does not exist")
  if config.train.executable:
    files.check_exists("train.executable", config.train.executable)


def _check_run(config: Config, workdir: str | Path, mesh, meta: dict | None) -> Config:
  """Checks a config against the newest checkpoint and the mesh; fills in `vocab_size`."""
  if meta:
    check_workdir(config, meta, Path(workdir))
    size = meta["config"]["model"]["vocab_size"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
  return check_run(config, mesh)


def check_workdir(config: Config, meta: dict, workdir: Path):
  """Refuses a workdir whose checkpoints have another config, naming the differences.

  Args:
    meta: of the workdir's newest checkpoint.
  Raises:
    UserError: which keys differ, beside those that may change when a run resumes.
  """
  values = configs.with_new_names(meta["config"])
  if values != meta["config"]:
    raise UserError(
      f"{workdir} holds a run of an earlier version, whose optimizer state has another form: begin "
      f"a run in another --workdir with --config.init.checkpoint={workdir}"
    )
  there = configs.flat(configs.freeze(values, Config))
  here = configs.flat(config)
  here["model.vocab_size"] = here["model.vocab_size"] or there["model.vocab_size"]
  differing = [key for key, value in binding(here).items() if value != there[key]]
  if {"train.steps", "optim.schedule"}.issuperset(differing):
    if differing:
      check_schedule(config.optim, config.train.steps, done=meta["step"])
    for key in differing:
      multihost.say(f"{key} was {there[key]} and is now {here[key]}")
  else:
    shown = ", ".join(f"{key} ({there[key]!r} there, {here[key]!r} here)" for key in differing[:4])
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise UserError(
      f"{workdir} holds a run of another config: {shown}{more}; use another --workdir"
    )


def _initial(config: Config, fresh):
  """The run's initial weights: those of `init.checkpoint`, adapted to the model, or fresh ones."""
  path = config.init.checkpoint
  if not path:
    return fresh
  multihost.say(f"weights of {path}")
  return init_from(load(path), config.model, fresh, config.init.drop, config.seed)


def _tokenizer(config: Config, documents):
  if config.tokenizer.path:
    multihost.say(f"reading the tokenizer {config.tokenizer.path}")
  else:
    multihost.say(f"training a {config.tokenizer.kind} tokenizer")
  return make_tokenizer(config.tokenizer, documents)


def _finish(config, workdir, tokenizer, held_out, model, train_s, scores, began_s) -> dict:
  """Writes the plots, the samples and the result of a finished run."""
  result = {
    **scores,
    **compressor_bits_per_byte(held_out),
    "train_seconds": round(train_s, 2),
    **rates(workdir),
    "steps": config.train.steps,
    "parameters": build.count_parameters(config.model),
    "config_hash": configs.config_hash(config),
    "first_words": _first_words(held_out[0].text, config.model.max_seq_len),
    "tokenizer": report(tokenizer, [document.text for document in held_out[:_REPORTED]]),
  }
  plot_loss(workdir, workdir / "loss.png", levels(result))
  if config.model.moe.experts:
    plot_experts(workdir, workdir / "experts.png")
    result["moe_max_load"] = _last_fifth(workdir, "moe_max_load")
  if config.model.kind == "decoder":
    model = Model(config.model, model, tokenizer)
    _write_samples(model, config.sample.prompts, _sampling(config), workdir)
  result["total_seconds"] = round(time.perf_counter() - began_s, 2)
  files.replace(workdir / "result.json", files.to_json(result, indent=1) + "\n")
  write_page(workdir, config)
  return result


def _first_words(text: str, context: int) -> str:
  """The beginning of a text; even in tokens of one byte it takes at most half of the context."""
  return " ".join(text.split()[:5])[: min(40, max(1, context // 8))].strip()


def load(path: str | Path) -> Model:
  """Loads a model from a workdir, a checkpoint folder, a Hugging Face folder or a GGUF file.

  Raises:
    UserError: there is nothing, or nothing that can be read.
  """
  return Model(**vars(_load(path)))


def _load(path: str | Path):
  if gguf.is_file(path):
    return gguf.load_file(path)
  if Path(path).is_file():
    raise UserError(f"{str(path)!r} is a file, but not a GGUF file")
  if hf.is_folder(path):
    return hf.load_folder(path)
  model = load_model(path)[0]
  if model.tokenizer is None and model.config.kind != "vision":
    multihost.say("llmjax: note: the checkpoint holds no tokenizer, so the model has none")
  return model


def count_parameters(config) -> int:
  """Counts the weights of an experiment's model, without making an array.

  Args:
    config: the experiment or its `model` section, frozen or editable.
  Raises:
    UserError: a section whose `vocab_size` is 0, which only the experiment's tokenizer tells.
  """
  if hasattr(config, "model"):
    return build.count_parameters(check_config(configs.frozen(config, Config)).model)
  model = configs.frozen(config, ModelConfig, "model.")
  if not model.vocab_size:
    raise UserError(
      "model.vocab_size is 0, to be filled in from the tokenizer: set it, or give the whole config"
    )
  return build.count_parameters(model)


def evaluate(checkpoint: str | Path, overrides: Sequence[str] = ()) -> dict:
  """Measures the loss of a model on text. Writes nothing, unless `data.cache` names a folder.

  Args:
    checkpoint: anything `load` reads: a workdir, a checkpoint, a Hugging Face folder, a GGUF file.
    overrides: `--config.a.b=v` arguments for the checkpoint's config, with keys of `EVAL_KEYS`. If
      `data.sources` is one of them, all of that text is scored, else the run's held-out text.
  Returns:
    `nats_per_token`, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and the bits per byte of
    gzip and xz on the same bytes.
  Raises:
    UserError: no model, no text, or a key that an evaluation does not read.
  """
  model, config, data_key = _load_run(checkpoint)
  if model.tokenizer is None:
    raise UserError(f"{str(checkpoint)!r} holds no tokenizer, so no text can be scored")
  config = configs.override(config, overrides)
  keys = [argument.removeprefix("--config.").partition("=")[0] for argument in overrides]
  for key in keys:
    if key not in EVAL_KEYS:
      raise UserError(f"config key {key!r} changes nothing here; eval reads {', '.join(EVAL_KEYS)}")
  if "data.sources" in keys:
    documents = read_all(config.data)
  else:
    trained, documents = read_split(config.data)
    if store_key(trained, model.tokenizer) != data_key:
      multihost.say(
        f"llmjax: warning: the text of {config.data.sources!r} has changed since this run was "
        "trained, so text scored here may have been trained on"
      )
  mesh = make_mesh(MeshConfig())
  parameters = jax.device_put(model.parameters, weight_shardings(mesh, model.parameters))
  store = prepare(documents, model.tokenizer, config.data.cache)
  task, of_eval = config.task_of(model.tokenizer), config.eval
  scores = evaluate_loss(
    parameters, store, mesh, task, of_eval.batch_size, of_eval.stride, show=True
  )
  return {**scores, **compressor_bits_per_byte(documents)}


def _load_run(path: str | Path) -> tuple[Model, Config, str]:
  """A model with the config of its run and the key of its training text, where it has a run."""
  if gguf.is_file(path) or hf.is_folder(path):
    model = load(path)
    return model, Config(model=model.config, data=DataConfig(sources="")), ""
  model, meta = load_model(path)
  return model, configs.freeze(configs.with_new_names(meta["config"]), Config), meta["data_key"]


def _last_fifth(workdir: Path, name: str) -> float:
  """Averages a metric over the last fifth of the reported steps."""
  values = [line[name] for line in read_metrics(workdir) if name in line]
  return round(statistics.fmean(values[-max(1, len(values) // 5) :]), 4)


def _sampling(config: Config) -> Sampling:
  options = dataclasses.asdict(config.sample)
  del options["prompts"]
  return Sampling(**options, seed=config.seed)


def _write_samples(model: Model, prompts, sampling: Sampling, workdir: Path):
  texts = [
    f"--- prompt: {prompt!r}\n{prompt}{completion.text}\n"
    for prompt, completion in zip(prompts, generate(model, prompts, sampling), strict=True)
  ]
  files.replace(workdir / "samples.txt", "\n".join(texts))
