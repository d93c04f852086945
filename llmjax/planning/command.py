"""`llmjax plan`: its flags, and what it does with them."""

import argparse
import re
import sys
from pathlib import Path

from llmjax.core import config as configs
from llmjax.core.errors import UserError
from llmjax.planning import report
from llmjax.planning.candidates import change
from llmjax.planning.formulas import priced
from llmjax.planning.patch import patch
from llmjax.planning.plan import above_zero, plan
from llmjax.planning.search import search
from llmjax.training.config import Config

_UNITS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_ALONE = ("decode", "keep_hlo", "keep_executable")
_SEARCHING = ("tokens", "patch")


# Beside --config: name, default, help and placeholder, as `llmjax/cli.py` says.
FLAGS = (
  ("--topology", None, "chip and slice shape: v5p:4x4x4, v5e:8x8, h100:64", "CHIPS"),
  ("--slices", 1, "number of slices, connected by the data-center network"),
  ("--price", float, "dollars per chip-hour; default: the list price"),
  ("--decode", False, "plan generation instead of training"),
  ("--keep-hlo", "", "write the HLO of the compiled program", "FILE"),
  ("--keep-executable", "", "write the compiled step, for train.executable", "FILE"),
  ("--search", False, "search for the best mesh and settings, also over --topology=A,B,C"),
  ("--tokens", "", "tokens of the whole run, such as 20B"),
  ("--compile", 8, "number of candidates to compile", "N"),
  ("--jobs", 0, "parallel compilations; default: one per core"),
  ("--patch", "", "write the best candidate as a patch of the config file", "FILE"),
)


def command(args: argparse.Namespace, overrides: list[str]) -> dict:
  """Plans or searches, and prints the answer for people.

  Returns:
    What `plan` or `search` returns.
  Raises:
    UserError: flags that do not go together, and what these two raise.
  """
  config = configs.load(args.config, overrides, Config)
  for flag in _ALONE if args.search else _SEARCHING:
    if getattr(args, flag) not in (None, False, ""):
      goes = "does not go" if args.search else "goes"
      raise UserError(f"--{flag.replace('_', '-')} {goes} with --search")
  if args.search:
    return _search(args, config)
  result = plan(
    config, args.topology, args.slices, args.price, args.decode, args.keep_hlo,
    args.keep_executable,
  )
  print(report.show(result))
  return result


def _search(args, config: Config) -> dict:
  above_zero("--price", args.price)
  if args.compile < 0 or args.jobs < 0:
    raise UserError(f"--compile={args.compile} --jobs={args.jobs}: neither may be negative")
  topologies = [priced(name.strip(), args.slices, args.price) for name in args.topology.split(",")]
  tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
  tokens = amount(args.tokens)
  result = search(config, topologies, tokens, args.compile, args.jobs, report=tell)
  print(report.show_search(result))
  if args.patch and result["winner"]:
    if text := patch(args.config, change(config, result["winner"]["changes"])):
      Path(args.patch).write_text(text)
    else:
      tell(f"{args.config} already holds the best settings: {args.patch} is not written")
  return result


def amount(tokens: str) -> float:
  """Reads `20B`, `1.5T` or `2e10` tokens; "" is 0.

  Raises:
    UserError: another form.
  """
  found = re.fullmatch(r"([\d,]*\.?\d+(?:e\d+)?)([kKMBT]?)", tokens.strip() or "0")
  value = float(found[1].replace(",", "")) * _UNITS[found[2]] if found else 0
  if tokens.strip() and not value:
    raise UserError(f"--tokens={tokens} is not an amount above 0, such as --tokens=20B")
  return value
