"""`llmjax <verb>`: parses, calls one function, prints.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 the user's
input was wrong (one line), 1 anything else.
"""

import argparse
import dataclasses
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from llmjax import Sampling, convert, embed, load, run
from llmjax.bench import suite
from llmjax.core import config as configs
from llmjax.core import interrupt
from llmjax.core.errors import RunFailed, UserError, nearest
from llmjax.core.files import to_json
from llmjax.core.platform import spare_libtpu
from llmjax.parallel import channels, join, multihost
from llmjax.parallel.mesh import abstract_mesh
from llmjax.planning import command
from llmjax.serve.generate import Completion, stream
from llmjax.training import check as checks
from llmjax.training.checkpoint import newest_meta
from llmjax.training.config import Config


class _Parser(argparse.ArgumentParser):
  """argparse, but a mistake is a `UserError` like any other."""

  def error(self, message):
    raise UserError(f"{message} (see {self.prog} --help)")


# Of each verb: what it does, and its flags as (name, default, help, placeholder): no default means
# it must be given, False a switch, () what may be repeated, float a number that may be left out;
# other defaults say the type.
_CONFIG = ("--config", None, "Python file, get_config()", "FILE")
_RUN = (_CONFIG, ("--workdir", None, "folder of the run", "DIR"))
_FLAGS = {
  "train": ("Run or resume an experiment: --config.section.key=value overrides.", _RUN),
  "launch": (
    "Run or resume an experiment in several processes.",
    (
      *_RUN,
      ("--on", None, "local:N: N processes, here", "WHERE"),
      ("--devices", 1, "CPU devices of a process"),
    ),
  ),
  "generate": (
    "Continue a prompt.",
    (
      ("--checkpoint", None, "workdir, checkpoint, Hugging Face folder or GGUF file", "PATH"),
      ("--prompt", None, "what comes before", "TEXT"),
      ("--temperature", 0.8, "0 is greedy"),
      ("--top_k", 0, "0 keeps all"),
      ("--top_p", 0.95, "the fewest tokens of so much probability"),
      ("--min_p", 0.0, "tokens of so much of the likeliest one's probability"),
      ("--repetition_penalty", 1.0, "lowers tokens that were there already"),
      ("--stop", (), "ends the text where it would come; may be repeated", "TEXT"),
      ("--max_tokens", 128, "how many to write at most"),
      ("--seed", 0, "of the draws"),
      ("--special", False, "special tokens that the prompt spells out are tokens"),
      ("--chat", False, "the prompt is a message, put into the chat template"),
      ("--image", (), "an image; may be repeated", "FILE"),
    ),
  ),
  "embed": (
    "Turn texts into vectors.",
    (
      ("--checkpoint", None, "as generate's", "PATH"),
      ("--text", (), "a text; may be repeated", "TEXT"),
      ("--pooling", "", "mean, cls, max, lasttoken, ..., or several with +; else the model's own"),
      ("--prompt", "", "stands before every text; else the model's own", "TEXT"),
    ),
  ),
  "eval": (
    "Measure loss and bits per byte: --config.data.sources=FOLDER for text.",
    (("--checkpoint", None, "workdir or checkpoint", "DIR"),),
  ),
  "convert": (
    "Write a model in another format.",
    (
      ("--from", None, "as generate's --checkpoint", "PATH"),
      ("--to", None, "folder, empty or not there", "DIR"),
      ("--format", "huggingface", "huggingface or checkpoint"),
      ("--dtype", "float32", "float32, bfloat16 or float16"),
      ("--family", "", "model_type to write; else the one that fits"),
    ),
  ),
  "bench": (
    "Measure against peers; --config.section.key=value tunes llmjax.",
    (
      ("name", None, "train, moe, decode, data, attention or plan", "NAME"),
      ("--size", "L", "L (35.7 M parameters), S (4.5 M) or tiny"),
      ("--dtype", "float32", "float32 or bfloat16"),
      ("--peers", "", "all by default", "A,B"),
      ("--rounds", 5, "times round all peers"),
      ("--seconds", 5.0, "least length of a peer's turn"),
    ),
  ),
  "check": (
    "Prove that every mesh gives the loss and gradients of one device.",
    (
      ("--config", None, "shrunk by rule to fit", "FILE"),
      ("--devices", 8, "on a CPU as many are made"),
      ("--meshes", "some", "some or all"),
    ),
  ),
  "plan": ("Tell what a run needs and costs, with no chip at hand.", (_CONFIG, *command.FLAGS)),
}
_JSON = ("--json", False, "last line of standard output: the result as JSON")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="llmjax", description="Train, sample and evaluate language models.")
  verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
  for name, (text, flags) in _FLAGS.items():
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    for flag in (_JSON, *flags):
      _add(verb, *flag)
  return parser


def _add(verb: argparse.ArgumentParser, name, default, text, placeholder=None):
  if default is False:
    verb.add_argument(name, action="store_true", help=text)
  elif default == ():
    verb.add_argument(name, action=_Filled, default=[], help=text, metavar=placeholder)
  elif default is None:
    must = {"required": True} if name.startswith("-") else {}
    action = "store" if placeholder == "TEXT" else _Filled
    verb.add_argument(name, action=action, help=text, metavar=placeholder, **must)
  elif default is float:
    verb.add_argument(name, type=_finite, help=text, metavar=placeholder)
  else:
    said = f"{text} (default {default})" if default else text
    kind = _finite if isinstance(default, float) else type(default)
    action = _Filled if kind is str else "store"
    verb.add_argument(
      name, type=kind, action=action, default=default, help=said, metavar=placeholder
    )


class _Filled(argparse.Action):
  """Stores text that is not empty, in a list where there is one."""

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


_finite.__name__ = "float"  # what argparse calls it where the text is no number


def _train(args, overrides) -> dict:
  join.join()
  result = run.train(configs.load(args.config, overrides, Config), args.workdir)
  if not multihost.is_writer():
    return result
  print(_verdict(result))
  print(f"{args.workdir} holds loss.png, samples.txt, result.json. What to try next:")
  me = _command()
  print(f"  {me} generate --checkpoint={args.workdir} --prompt='def main('")
  print(f"  {me} eval --checkpoint={args.workdir} --config.data.sources=FOLDER")
  print(f"  {me} train --config={args.config} --workdir=runs/mine --config.data.sources=FOLDER")
  return result


def _launch(args, overrides) -> dict:
  from launch import local  # here, because other verbs need nothing from outside of llmjax

  kind, _, number = args.on.partition(":")
  if kind != "local":
    raise UserError(f"--on={args.on}: unknown kind of machine {kind!r}; {nearest(kind, ['local'])}")
  if not number.isdecimal() or int(number) < 1:
    raise UserError(f"--on={args.on}: {number!r} is not a number of processes, 1 or more")
  if args.devices < 1:
    raise UserError(f"--devices={args.devices} is less than 1")
  # A mistake is told before anything is started.
  config = configs.load(args.config, overrides, Config)
  run.check_places(config, args.workdir)
  mesh = abstract_mesh(config.mesh, int(number) * args.devices)
  run.ready(config, args.workdir, mesh, newest_meta(Path(args.workdir)))
  return local.launch(args.config, args.workdir, int(number), args.devices, overrides)


def _verdict(result: dict) -> str:
  if "bits_per_byte" not in result:
    return f"held-out text: {result['nats_per_token']:.3f} nats a hidden token"
  return (
    f"held-out text: {result['bits_per_byte']:.3f} bits per byte "
    f"(gzip -9: {result['gzip_bits_per_byte']:.3f}, xz -9: {result['xz_bits_per_byte']:.3f})"
  )


def _command() -> str:
  """How this program was called, so that what is printed can be pasted."""
  if Path(sys.argv[0]).name != "llmjax":
    return "python -m llmjax"
  return "llmjax" if shutil.which("llmjax") == sys.argv[0] else os.path.relpath(sys.argv[0])


def _generate(args, overrides) -> dict:
  _no_overrides(overrides)
  names = [field.name for field in dataclasses.fields(Sampling)]
  sampling = Sampling(**{name: getattr(args, name) for name in names})
  model = load(args.checkpoint)
  stride = 1 if sys.stdout.isatty() else 16
  pieces = stream(model, args.prompt, sampling, args.image, args.chat, args.special, stride)
  anew = args.chat or model.config.kind == "encoder_decoder"
  made = _print_pieces("" if anew else args.prompt, pieces)
  return {"prompt": args.prompt, "text": made.text, "ids": made.ids, "finish": made.finish}


def _print_pieces(first: str, pieces) -> Completion:
  """Prints text while it is written, after `first`; returns all that was written."""
  print(first, end="", flush=True)
  while True:
    try:
      print(next(pieces), end="", flush=True)
    except StopIteration as end:
      print()
      return end.value


def _embed(args, overrides) -> dict:
  _no_overrides(overrides)
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


def _bench(args, overrides) -> dict:
  peers = tuple(name.strip() for name in args.peers.split(",") if name.strip())
  options = suite.Options(
    args.size, args.dtype, peers, args.rounds, args.seconds, tuple(overrides)
  )
  result = suite.bench(args.name, options)
  print(suite.show(result))
  return result


def _check(args, overrides) -> dict:
  if args.devices < 2:
    raise UserError(f"--devices={args.devices}: a mesh has at least 2")
  if args.meshes not in ("some", "all"):
    raise UserError(f"--meshes={args.meshes}; {nearest(args.meshes, ('some', 'all'))}")
  _force_devices(args.devices)  # before jax makes its devices
  config = configs.load(args.config, overrides, Config)
  meshes = list(checks.all_meshes(args.devices)) if args.meshes == "all" else ()
  tell = lambda row: print(checks.show_row(row), flush=True)  # noqa: E731
  result = checks.check(config, args.devices, meshes, tell)
  print(checks.summary(result))
  for row in result["meshes"]:
    if row["ok"] is False:
      print(f"llmjax: check failed: {checks.show_row(row)}", file=sys.stderr)
  return result


def _force_devices(count: int):
  """Has a CPU act as so many devices, unless XLA_FLAGS says how many; leaves accelerators alone.

  They share its cores, so one may wait for the others longer than XLA would let it.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  for flag, value in (
    ("xla_force_host_platform_device_count", count),
    ("xla_cpu_collective_call_terminate_timeout_seconds", 600),
  ):
    if flag not in flags:
      flags += f" --{flag}={value}"
  os.environ["XLA_FLAGS"] = flags.strip()
  channels.reserve_threads()


def _convert(args, overrides) -> dict:
  _no_overrides(overrides)
  result = convert(getattr(args, "from"), args.to, args.format, args.dtype, args.family)
  print(
    f"{result['path']}: {result['parameters']:,} parameters as {result['family']}, "
    f"{result['bytes']:,} bytes"
  )
  return result


def _no_overrides(overrides):
  if overrides:
    raise UserError(f"this verb takes no {overrides[0].split('=')[0]}")


VERBS = {
  "train": _train,
  "launch": _launch,
  "generate": _generate,
  "embed": _embed,
  "eval": _evaluate,
  "convert": _convert,
  "bench": _bench,
  "check": _check,
  "plan": command.command,
}


def main(argv: list[str] | None = None) -> int:
  """Runs one command line; returns its exit status."""
  argv = sys.argv[1:] if argv is None else argv
  spare_libtpu()
  try:
    args, rest = _parse(argv)
    with interrupt.prompt():
      result = VERBS[args.verb](args, rest)
  except UserError as error:
    print(f"llmjax: error: {' '.join(str(error).split())}", file=sys.stderr)
    return join.leave(2)
  except RunFailed as error:
    print(f"llmjax: failed: {error}", file=sys.stderr)
    return join.leave(1)
  except KeyboardInterrupt as error:
    interrupt.say(str(error))
    # A stop that all processes agreed on says so; they end together.
    return 1 if error.args else join.leave(1)
  except Exception:
    join.leave(1)
    raise
  if args.json and (args.verb != "train" or multihost.is_writer()):
    print(to_json(result))
  return 0 if result.get("ok", True) else 1


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
  return args, overrides
