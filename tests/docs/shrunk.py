"""`llmjax`, shrunk to seconds: what the shell blocks of pages run as `llmjax` when they are tested.

`python -m tests.docs.shrunk VERB …` runs `llmjax VERB …` with the options of `shrunk`. Benchmarks,
which tests/bench runs, are not run.
"""

import sys
from pathlib import Path

from llmjax.cli import main

STEPS = {"train.steps": "2", "sample.max_tokens": "4", "optim.warmup": "0.1"}
# The rest only where a command does not set it.
MODEL = {
  "model.layers": "2",
  "model.width": "32",
  "model.heads": "4",
  "model.kv_heads": "2",
  "model.mlp_width": "64",
  "model.max_seq_len": "32",
  "eval.stride": "0",
}
DATA = {"data.sources": "FOLDER", "data.batch_size": "8", "tokenizer.vocab_size": "400"}
OWN_PROCESS = ("check", "launch")  # which say how many devices a CPU has
OPTIONS = {
  "check": ["--devices=2"],
  "generate": ["--max_tokens=4"],
}


def shrunk(argv: list[str]) -> list[str]:
  """Returns a command line with few steps of a small model; the last of equal options counts."""
  verb = argv[0]
  argv = [word.replace("data.sources=llmjax", "data.sources=FOLDER") for word in argv]
  argv = [word for word in argv if not word.startswith("--keep-")]  # of the TPU's compiler
  config = next((word.partition("=")[2] for word in argv if word.startswith("--config=")), "")
  keys = {}
  if verb in ("train", "launch"):
    is_published = "llmjax.load(" in Path(config).read_text()  # a model that has its size
    keys = DATA | STEPS | ({} if is_published else MODEL)
  if verb == "data":
    keys = DATA | MODEL
  if verb == "plan":
    keys = {"model.layers": "2"}
  given = {word.partition("=")[0].removeprefix("--config.") for word in argv}
  if "optim.schedule" not in given:  # whose options may be numbers of steps
    given -= STEPS.keys()
  if config and ("tokenizer.path" in given or "tokenizer.path" in Path(config).read_text()):
    given.add("tokenizer.vocab_size")
  more = OPTIONS.get(verb, []) + ["--compile=0"] * ("--search" in argv)
  return [*argv, *more, *(f"--config.{key}={keys[key]}" for key in keys if key not in given)]


def run(argv: list[str]) -> int:
  """Runs a command line, shrunk; returns its exit status."""
  return 0 if argv[0] == "bench" else main(shrunk(argv))


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
