"""`llmjax VERB`: parses the command line, calls one function, prints its result on standard output
and everything else on standard error. Exit status: 0 done, 2 wrong input (one line), 1
otherwise."""

import argparse
import dataclasses
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmjax import Sampling, convert, embed, generate, load, run, stream
from llmjax.bench import suite
from llmjax.core import config as configs
from llmjax.core import interrupt
from llmjax.core.choices import check_choice
from llmjax.core.errors import RunFailed, UserError, nearest
from llmjax.core.files import to_json
from llmjax.data_show import data_show, parse_rows, show_rows
from llmjax.parallel import channels, join, multihost
from llmjax.planning import command
from llmjax.serve.generate import Completion
from llmjax.training import check as checks
from llmjax.training.config import Config


def main(argv: list[str] | None = None) -> int:
  """Runs one command line; returns its exit status."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    args, overrides = _parse(argv)
    with interrupt.end_on_sigint():
      result = VERBS[args.verb].call(args, overrides)
  except UserError as error:
    print(f"llmjax: error: {' '.join(str(error).split())}", file=sys.stderr)
    return join.leave(2)
  except RunFailed as error:
    print(f"llmjax: failed: {error}", file=sys.stderr)
    return join.leave(1)
  except BrokenPipeError:  # the reader of standard output, such as `head`, has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return join.leave(1)
  except KeyboardInterrupt as error:
    interrupt.say(str(error))
    # With a message, all processes agreed to stop and end together.
    return 1 if error.args else join.leave(1)
  except Exception:
    join.leave(1)
    raise
  if args.json and (args.verb != "train" or multihost.is_writer()):
    print(to_json(result))
  return 0 if result.get("ok", True) else 1


def _train(args, overrides) -> dict:
  join.join()
  config = configs.load(args.config, overrides, Config)
  result = run.train(config, args.workdir)
  if not multihost.is_writer():
    return result
  if "bits_per_byte" in result:
    print(
      f"held-out text: {result['bits_per_byte']:.3f} bits per byte "
      f"(gzip -9: {result['gzip_bits_per_byte']:.3f}, xz -9: {result['xz_bits_per_byte']:.3f})"
    )
  else:
    print(f"held-out text: {result['nats_per_token']:.3f} nats per masked token")
  print(f"{args.workdir} holds report.html, samples.txt, result.json. What to try next:")
  for line in _next_commands(args, config.model.kind, result["first_words"]):
    print(f"  {line}")
  return result


def _next_commands(args, kind: str, words: str) -> list[str]:
  """Commands for a finished run, ready to be pasted; `words` are text for its model."""
  me, text = _program(), shlex.quote(words)
  workdir, config = shlex.quote(args.workdir), shlex.quote(args.config)
  another = shlex.quote(f"{args.workdir.rstrip('/')}-2")
  use = f"embed --text={text}" if kind == "encoder" else f"generate --prompt={text}"
  return [
    f"{me} {use} --checkpoint={workdir}",
    f"{me} eval --checkpoint={workdir}",
    f"{me} train --config={config} --workdir={another} --config.data.sources=FOLDER",
  ]


def _program() -> str:
  """How this program was called, so that printed commands can be pasted."""
  name, tail = ("llmjax", "") if Path(sys.argv[0]).name == "llmjax" else ("python", " -m llmjax")
  called = sys.executable if tail else sys.argv[0]
  return (name if shutil.which(name) == called else shlex.quote(os.path.relpath(called))) + tail


def _launch(args, overrides) -> dict:
  from launch import local  # here, because the other verbs need nothing outside llmjax

  kind, _, number = args.on.partition(":")
  if kind != "local":
    raise UserError(f"--on={args.on}: unknown kind of machine {kind!r}; {nearest(kind, ['local'])}")
  if not number.isdecimal() or int(number) < 1:
    raise UserError(f"--on={args.on}: {number!r} is not a number of processes, 1 or more")
  if args.devices < 1:
    raise UserError(f"--devices={args.devices} is less than 1")
  config = configs.load(args.config, overrides, Config)
  run.check_start(config, args.workdir, int(number) * args.devices)
  return local.launch(args.config, args.workdir, int(number), args.devices, overrides)


def _generate(args, overrides) -> dict:
  if not args.prompt:
    raise UserError("--prompt is missing (see llmjax generate --help)")
  names = [field.name for field in dataclasses.fields(Sampling)]
  sampling = Sampling(**{name: getattr(args, name) for name in names})
  model = load(args.checkpoint)
  continues = not args.chat and model.config.kind != "encoder_decoder"
  written = []
  if len(args.prompt) == 1:
    stride = 1 if sys.stdout.isatty() else 16
    pieces = stream(model, args.prompt[0], sampling, args.image, args.chat, args.special, stride)
    written.append(_print_pieces(args.prompt[0] if continues else "", pieces))
  else:
    images = [args.image] * len(args.prompt) if args.image else None
    written += generate(model, args.prompt, sampling, images, args.chat, args.special)
    for prompt, completion in zip(args.prompt, written, strict=True):
      print(f"--- {prompt!r}\n{prompt if continues else ''}{completion}")
  results = [
    {"prompt": prompt, **dataclasses.asdict(completion)}
    for prompt, completion in zip(args.prompt, written, strict=True)
  ]
  return results[0] if len(results) == 1 else {"completions": results}


def _print_pieces(first: str, pieces) -> Completion:
  """Prints text while it is generated, after `first`; returns the completion."""
  print(first, end="", flush=True)
  while True:
    try:
      print(next(pieces), end="", flush=True)
    except StopIteration as end:
      print()
      return end.value


def _embed(args, overrides) -> dict:
  if not args.text:
    raise UserError("--text is missing (see llmjax embed --help)")
  vectors = embed(load(args.checkpoint), args.text, args.pooling or None, None, args.prompt or None)
  for text, vector in zip(args.text, vectors, strict=True):
    cosines = vectors @ vector / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vector)
    print(f"{' '.join(f'{cosine:7.4f}' for cosine in cosines)}  {text}")
  return {"vectors": vectors.tolist()}


def _evaluate(args, overrides) -> dict:
  result = run.evaluate(args.checkpoint, overrides)
  for name, value in result.items():
    print(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")
  return result


def _data(args, overrides) -> dict:
  check_choice("data", args.action, ("show",))
  config = configs.load(args.config, overrides, Config)
  result = data_show(config, args.workdir, args.step, parse_rows(args.rows))
  print(show_rows(result))
  return result


def _convert(args, overrides) -> dict:
  result = convert(getattr(args, "from"), args.to, args.format, args.dtype, args.family)
  print(
    f"{result['path']}: {result['parameters']:,} parameters as {result['family']}, "
    f"{result['bytes']:,} bytes"
  )
  return result


def _bench(args, overrides) -> dict:
  peers = tuple(name.strip() for name in args.peers.split(",") if name.strip())
  result = suite.bench(
    args.name, args.size, args.dtype, peers, args.rounds, args.seconds, overrides
  )
  print(suite.show(result))
  return result


def _check(args, overrides) -> dict:
  if args.devices < 2:
    raise UserError(f"--devices={args.devices}: a mesh has at least 2")
  check_choice("--meshes", args.meshes, ("some", "all"))
  channels.force_devices(args.devices)  # before jax initializes its devices
  config = configs.load(args.config, overrides, Config)
  meshes = list(checks.all_meshes(args.devices)) if args.meshes == "all" else ()
  tell = lambda row: print(checks.show_row(row), flush=True)  # noqa: E731
  result = checks.check(config, args.devices, meshes, tell)
  print(checks.summary(result))
  for row in result["meshes"]:
    if row["ok"] is False:
      print(f"llmjax: check failed: {checks.show_row(row)}", file=sys.stderr)
  return result


class _Verb(NamedTuple):
  """What a verb does, and its flags as (name, default, help, placeholder).

  A flag without a default must be given, False makes a switch, () a flag that may be repeated, and
  `float` an optional number; any other default says the type.
  """

  call: Callable
  help: str
  flags: tuple
  overrides: bool = True  # whether it takes --config.section.key=value


_CONFIG = ("--config", None, "Python file with get_config()", "FILE")
_RUN = (_CONFIG, ("--workdir", None, "folder of the run", "DIR"))
_MODEL = "workdir, checkpoint, Hugging Face folder or GGUF file"
_JSON = ("--json", False, "print the result as JSON in the last line of standard output")
VERBS = {
  "train": _Verb(
    _train, "Run or resume an experiment; --config.section.key=value overrides a key.", _RUN
  ),
  "launch": _Verb(_launch, "Run or resume an experiment in several processes.", (
    *_RUN,
    ("--on", None, "local:N starts N processes on this machine", "WHERE"),
    ("--devices", 1, "CPU devices per process"),
  )),
  "generate": _Verb(_generate, "Generate text from a prompt.", (
    ("--checkpoint", None, _MODEL, "PATH"),
    ("--prompt", (), "text to continue; may be repeated", "TEXT"),
    ("--temperature", Sampling.temperature, "sampling temperature; 0 is greedy"),
    ("--top_k", Sampling.top_k, "sample from the k most likely tokens; 0 keeps all"),
    ("--top_p", Sampling.top_p, "nucleus sampling: the fewest tokens with this total probability"),
    ("--min_p", Sampling.min_p, "drop tokens below this fraction of the highest probability"),
    ("--repetition_penalty", Sampling.repetition_penalty,
     "lowers the scores of tokens already present; 1 is off"),
    ("--stop", (), "string that ends the text; may be repeated", "TEXT"),
    ("--max_tokens", Sampling.max_tokens, "maximum number of new tokens"),
    ("--seed", Sampling.seed, "random seed of sampling"),
    ("--special", False, "read special tokens that the prompt spells out as tokens"),
    ("--chat", False, "put the prompt into the chat template as a user message"),
    ("--image", (), "image file; may be repeated", "FILE"),
  ), False),
  "embed": _Verb(_embed, "Compute the embedding vectors of texts.", (
    ("--checkpoint", None, _MODEL, "PATH"),
    ("--text", (), "a text; may be repeated", "TEXT"),
    ("--pooling", "", "mean, cls, max, lasttoken, … or several, as a+b; default: the model's own"),
    ("--prompt", "", "prefix of every text; default: the model's own", "TEXT"),
  ), False),
  "eval": _Verb(_evaluate, "Measure the loss on held-out text, or on --config.data.sources=DIR.", (
    ("--checkpoint", None, _MODEL, "PATH"),
  )),
  "data": _Verb(_data, "Show the documents of a training step's rows and what is predicted.", (
    ("action", None, "show", "show"),
    _CONFIG,
    ("--workdir", "", "folder of the run; default: a run that is to begin", "DIR"),
    ("--step", 1, "step of training, from 1"),
    ("--rows", "", "rows of the batch, such as 0-3,7; default: the first four", "ROWS"),
  )),
  "convert": _Verb(_convert, "Write a model in another format.", (
    ("--from", None, _MODEL, "PATH"),
    ("--to", None, "output folder, empty or new", "DIR"),
    ("--format", "huggingface", "huggingface or checkpoint"),
    ("--dtype", "float32", "float32, bfloat16 or float16"),
    ("--family", "", "model_type to write; default: the first that fits"),
  ), False),
  "bench": _Verb(_bench, "Compare with other programs; --config.section.key=value tunes llmjax.", (
    ("name", None, "train, moe, decode, data or attention", "NAME"),
    ("--size", "L", "model size: L (35.7 M parameters), S (4.5 M) or tiny"),
    ("--dtype", "float32", "float32 or bfloat16"),
    ("--peers", "", "programs to compare with; default: all", "A,B"),
    ("--rounds", 5, "number of rounds over all peers"),
    ("--seconds", 5.0, "minimum duration of a peer's turn"),
  )),
  "check": _Verb(_check, "Check that every mesh gives the loss and gradients of one device.", (
    ("--config", None, "Python file with get_config(); the model is shrunk by rule", "FILE"),
    ("--devices", 8, "number of devices; a CPU is split into as many"),
    ("--meshes", "some", "some or all"),
  )),
  "plan": _Verb(
    command.command, "Estimate memory, time and cost of a run without accelerators.",
    (_CONFIG, *command.FLAGS),
  ),
}


class _Parser(argparse.ArgumentParser):
  """argparse, with a `UserError` for a mistake."""

  def error(self, message):
    raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="llmjax", description="Train, sample and evaluate language models.")
  verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
  for name, (_, text, flags, _) in VERBS.items():
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    for flag in (_JSON, *flags):
      _add(verb, *flag)
  return parser


def _add(verb: argparse.ArgumentParser, name, default, text, placeholder=None):
  if default is False:
    verb.add_argument(name, action="store_true", help=text)
    return
  options = {"help": text, "metavar": placeholder, "default": default}
  if default == ():
    options |= {"action": _Filled, "default": []}
  elif default is None:
    options |= {"action": "store" if placeholder == "TEXT" else _Filled}
    options |= {"required": True} if name.startswith("-") else {}
  elif default is float:
    options |= {"type": _finite, "default": None}
  else:
    kind = _finite if isinstance(default, float) else type(default)
    options |= {"type": kind, "action": _Filled if kind is str else "store"}
    options["help"] += f" (default {default})" if default else ""
  verb.add_argument(name, **options)


class _Filled(argparse.Action):
  """Stores text that is not empty, in a list if the flag may be repeated."""

  def __call__(self, parser, space, text, option=None):
    if not text.strip():
      parser.error(f"{option or self.dest} is empty")
    before = getattr(space, self.dest)
    setattr(space, self.dest, [*before, text] if isinstance(before, list) else text)


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise argparse.ArgumentTypeError(f"{value} is not a finite number")
  return value


_finite.__name__ = "float"  # argparse's name for the type if the text is not a number


def _parse(argv):
  """Splits a command line into parsed arguments and `--config.a.b=v` overrides."""
  if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
    raise UserError(f"unknown verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
  overrides = [argument for argument in argv if argument.startswith("--config.")]
  args, unknown = _parser().parse_known_args(
    [argument for argument in argv if not argument.startswith("--config.")]
  )
  if unknown:
    raise UserError(f"unknown argument {unknown[0]!r} (see llmjax {args.verb} --help)")
  if overrides and not VERBS[args.verb].overrides:
    raise UserError(f"llmjax {args.verb} takes no {overrides[0].split('=')[0]}")
  return args, overrides
