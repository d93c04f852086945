"""Who is measured: every peer's name, the packages it needs, and the function that prepares it."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence

from llmjax.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Peer:
  """One competitor.

  Attributes:
    where: `module:function`; the function takes a `Spec` and returns (facts, measure).
    needs: importable packages without which it is left out.
    kind: what is added to the size's name: "-moe" or nothing.
  """

  where: str
  needs: tuple[str, ...] = ()
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a worker is to prepare.

  Attributes:
    where: the peer's function, as in `Peer`.
    size: a name of `sizes.SIZES`.
    dtype: compute dtype, float32 or bfloat16.
    folder: the weights, and a place for files of the run.
    cores: threads to use.
    overrides: `--config.a.b=v` arguments for llmjax.
  """

  where: str
  size: str
  dtype: str
  folder: str
  cores: int
  overrides: tuple[str, ...] = ()


_TORCH = ("torch", "transformers")

PEERS = {
  "train": {
    "llmjax": Peer("llmjax.bench.ours:train"),
    "transformers": Peer("llmjax.bench.torch_peers:train", _TORCH),
    "transformers-compile": Peer("llmjax.bench.torch_peers:train_compiled", _TORCH),
    "litgpt": Peer("llmjax.bench.litgpt_train:train", (*_TORCH, "litgpt", "lightning")),
  },
  "moe": {
    "llmjax": Peer("llmjax.bench.ours:train", kind="-moe"),
    "dense": Peer("llmjax.bench.ours:train"),
    "transformers": Peer("llmjax.bench.torch_peers:train", _TORCH, "-moe"),
  },
  "decode": {
    "llmjax": Peer("llmjax.bench.ours:decode"),
    "transformers": Peer("llmjax.bench.torch_peers:decode", _TORCH),
    "transformers-static": Peer("llmjax.bench.torch_peers:decode_static", _TORCH),
    "llama.cpp": Peer("llmjax.bench.ggml:decode", ("llama_cpp", "gguf")),
  },
  "data": {
    "step": Peer("llmjax.bench.ours:train"),
    "tokenize": Peer("llmjax.bench.ours:tokenize"),
    "load": Peer("llmjax.bench.ours:load"),
  },
}


def pick(bench: str, names: Sequence[str] = ()) -> dict[str, Peer]:
  """Chooses peers by name and leaves out, with a line on standard error, what is not installed.

  Args:
    bench: a key of `PEERS`.
    names: peers wanted; all by default.
  Raises:
    UserError: a name is unknown.
  """
  known = PEERS[bench]
  for name in names:
    if name not in known:
      raise UserError(f"unknown peer {name!r} of bench {bench}; {nearest(name, known)}")
  chosen = {}
  for name in [name for name in known if not names or name in names]:
    missing = [package for package in known[name].needs if not importlib.util.find_spec(package)]
    if missing:
      install = "see requirements-bench.txt: pip install --no-deps -r requirements-bench.txt"
      why = f"{missing[0]} is not installed; {install}"
      print(f"llmjax: {name} is left out, {why}", file=sys.stderr)
    else:
      chosen[name] = known[name]
  return chosen
