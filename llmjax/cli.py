"""`llmjax <verb>`: parses, calls one function, prints.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 the user's
input was wrong (one line), 1 anything else.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from llmjax.core.errors import UserError, nearest


class _Parser(argparse.ArgumentParser):
  """argparse, but a mistake is a `UserError` like any other."""

  def error(self, message):
    raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="llmjax", description="Train, sample and evaluate language models.")
  verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

  def verb(name, text):
    sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.add_argument(
      "--json", action="store_true", help="last line of standard output: the result as JSON"
    )
    return sub

  train = verb("train", "Run or resume an experiment: --config.section.key=value overrides.")
  train.add_argument("--config", required=True, metavar="FILE", help="Python file, get_config()")
  train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")

  generate = verb("generate", "Continue a prompt.")
  generate.add_argument(
    "--checkpoint",
    required=True,
    metavar="PATH",
    help="workdir, checkpoint, Hugging Face folder or GGUF file",
  )
  generate.add_argument("--prompt", required=True, metavar="TEXT")
  generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
  generate.add_argument("--top_k", type=int, default=0, help="0 keeps all")
  generate.add_argument("--top_p", type=float, default=0.95)
  generate.add_argument("--max_tokens", type=int, default=128)
  generate.add_argument("--seed", type=int, default=0)
  generate.add_argument(
    "--chat", action="store_true", help="the prompt is a message, put into the chat template"
  )
  generate.add_argument(
    "--image", action="append", default=[], metavar="FILE", help="an image; may be repeated"
  )

  evaluate = verb("eval", "Measure loss and bits per byte: --config.data.sources=FOLDER for text.")
  evaluate.add_argument("--checkpoint", required=True, metavar="DIR")

  bench = verb("bench", "Measure against peers; --config.section.key=value tunes llmjax.")
  bench.add_argument("name", metavar="NAME", help="train, decode, data or attention")
  bench.add_argument("--size", default="L", help="L (35.7 M parameters), S (4.5 M) or tiny")
  bench.add_argument("--dtype", default="float32", help="float32 or bfloat16")
  bench.add_argument("--peers", default="", metavar="A,B", help="all by default")
  bench.add_argument("--rounds", type=int, default=5, help="times round all peers")
  bench.add_argument("--seconds", type=float, default=5.0, help="least length of a peer's turn")
  convert = verb("convert", "Write a model in another format.")
  convert.add_argument(
    "--from", required=True, metavar="PATH", dest="source", help="as generate's --checkpoint"
  )
  convert.add_argument("--to", required=True, metavar="DIR", help="folder, empty or not there")
  convert.add_argument("--format", default="huggingface", help="huggingface (default), checkpoint")
  convert.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
  convert.add_argument("--family", default="", help="model_type to write; else the one that fits")
  return parser


def _train(args, overrides) -> dict:
  from llmjax import run
  from llmjax.core.config import load
  from llmjax.train.config import Config

  result = run.train(load(args.config, overrides, Config), args.workdir)
  print(_verdict(result))
  print(f"{args.workdir} holds loss.png, samples.txt, result.json. What to try next:")
  me = _command()
  print(f"  {me} generate --checkpoint={args.workdir} --prompt='def main('")
  print(f"  {me} eval --checkpoint={args.workdir} --config.data.sources=FOLDER")
  print(f"  {me} train --config={args.config} --workdir=runs/mine --config.data.sources=FOLDER")
  return result


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
  from llmjax import Sampling, generate, load

  _no_overrides(overrides)
  sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens, args.seed)
  model = load(args.checkpoint)
  made = generate(model, [args.prompt], sampling, [args.image], args.chat)[0]
  anew = args.chat or model.config.kind == "encoder_decoder"
  print(made.text if anew else args.prompt + made.text)
  return {"prompt": args.prompt, "text": made.text, "ids": made.ids, "finish": made.finish}


def _evaluate(args, overrides) -> dict:
  from llmjax import run

  result = run.evaluate(args.checkpoint, overrides)
  for name, value in result.items():
    print(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")
  return result


def _bench(args, overrides) -> dict:
  from llmjax.bench.suite import Options, bench, show

  peers = tuple(name.strip() for name in args.peers.split(",") if name.strip())
  options = Options(
    args.size, args.dtype, peers, args.rounds, args.seconds, tuple(overrides)
  )
  result = bench(args.name, options)
  print(show(result))
  return result


def _convert(args, overrides) -> dict:
  from llmjax import convert

  _no_overrides(overrides)
  result = convert(args.source, args.to, args.format, args.dtype, args.family)
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
  "generate": _generate,
  "eval": _evaluate,
  "convert": _convert,
  "bench": _bench,
}


def main(argv: list[str] | None = None) -> int:
  """Runs one command line; returns its exit status."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    args, rest = _parse(argv)
    result = VERBS[args.verb](args, rest)
  except UserError as error:
    print(f"llmjax: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt as error:
    print(f"llmjax: {error or 'interrupted'}; the same command goes on", file=sys.stderr)
    return 1
  if args.json:
    print(json.dumps(result))
  return 0


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
