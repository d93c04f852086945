"""Pooling token vectors into a text vector, and its files as sentence-transformers has them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from llmjax.core.errors import UserError, nearest
from llmjax.core.files import read_json, write_json

# In the order in which several are concatenated; sentence-transformers' keys that ask for them.
_KEYS = {
  "cls": "pooling_mode_cls_token",
  "max": "pooling_mode_max_tokens",
  "mean": "pooling_mode_mean_tokens",
  "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
  "weightedmean": "pooling_mode_weightedmean_tokens",
  "lasttoken": "pooling_mode_lasttoken",
}
POOLINGS = (*_KEYS, "pooler")
_SIZES = ("word_embedding_dimension", "embedding_dimension")
_GGUF = {1: "mean", 2: "cls", 3: "lasttoken"}
_MODULES = ("Transformer", "Pooling", "Normalize")
_MAIN, _PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"


@dataclasses.dataclass(frozen=True)
class Pooling:
  """How a text's token vectors become one vector.

  Attributes:
    modes: of `POOLINGS`; the vectors of several are concatenated.
    normalize: divides the vector by its length.
    prompt: prefix of every text.
    include_prompt: its tokens are pooled as well; `cls` is the first token in any case.
    longest: most tokens of a text; 0: the context.
    lower: lower-cases texts.
    refused: why the model's own pooling is not supported, if it is not.
  """

  modes: tuple[str, ...] = ("mean",)
  normalize: bool = True
  prompt: str = ""
  include_prompt: bool = True
  longest: int = 0
  lower: bool = False
  refused: str = ""

  def __post_init__(self):
    for mode in self.modes:
      if mode not in POOLINGS:
        raise UserError(f"unknown pooling {mode!r}; {nearest(mode, POOLINGS)}")
    # A list in a checkpoint.
    object.__setattr__(self, "modes", tuple(sorted(set(self.modes), key=POOLINGS.index)))


def pool(model, x_btd, real_bt, mode: str, pooled_bt=None):
  """Pools the token vectors of each text.

  Args:
    model: its projection `pooler` (BERT's) is used by mode pooler.
    x_btd: what `features` returns.
    real_bt: bool, false for padding, which is on the right.
    mode: mean or max over positions; mean_sqrt_len_tokens, the sum divided by √positions;
      weightedmean, position t counted t times; cls, the first; lasttoken; pooler, the first
      projected and tanh.
    pooled_bt: bool, the positions to pool; None: all of the text.
  Returns:
    x_bd, fp32.
  Raises:
    UserError: an unknown pooling, or a model without a pooler.
  Source: Reimers & Gurevych 2019, arXiv:1908.10084, sec. 3; weightedmean: Muennighoff 2022,
    arXiv:2202.08904, eq. 2.
  """
  x_btd = x_btd.astype(jnp.float32)
  counted_bt = real_bt if pooled_bt is None else pooled_bt & real_bt
  weight_bt1 = counted_bt[..., None].astype(jnp.float32)
  if mode == "weightedmean":
    weight_bt1 *= jnp.arange(1, x_btd.shape[1] + 1)[:, None]
  total_b1 = jnp.maximum(jnp.sum(weight_bt1, axis=1), 1e-9)
  match mode:
    case "mean" | "weightedmean":
      return jnp.sum(x_btd * weight_bt1, axis=1) / total_b1
    case "mean_sqrt_len_tokens":
      return jnp.sum(x_btd * weight_bt1, axis=1) / jnp.sqrt(total_b1)
    case "max":
      return jnp.max(jnp.where(weight_bt1 > 0, x_btd, -1e9), axis=1)
    case "lasttoken":
      last_b = jnp.maximum(jnp.sum(real_bt, axis=1) - 1, 0)
      return jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1)[:, 0]
    case "cls":
      return x_btd[:, 0]
    case "pooler" if hasattr(model, "pooler"):
      return model.pooler(x_btd[:, 0])
    case "pooler":
      raise UserError("this model has no pooler")
  raise UserError(f"unknown pooling {mode!r}; {nearest(mode, POOLINGS)}")


def from_gguf(kind: int | None) -> Pooling | None:
  """The pooling that a GGUF file's `pooling_type` names; llama.cpp normalizes the vectors."""
  if kind is None or kind in _GGUF:
    return None if kind is None else Pooling((_GGUF[kind],))
  return Pooling(refused=f"the file's pooling_type is {kind}; known: {_GGUF}")


def read(folder: Path) -> Pooling | None:
  """Reads a folder's pooling: None without such files, a `refused` one where it is unsupported."""
  if not (folder / "modules.json").is_file() and not (folder / "1_Pooling").is_dir():
    return None
  try:
    return _read(folder)
  except UserError as error:
    return Pooling(refused=str(error))


def _read(folder: Path) -> Pooling:
  subfolder, normalize = "1_Pooling", True
  if (folder / "modules.json").is_file():
    modules = read_json(folder / "modules.json", list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (list(_MODULES), list(_MODULES[:2])):
      raise UserError(f"{folder}/modules.json lists {kinds}; known: {', '.join(_MODULES)}")
    subfolder, normalize = modules[1]["path"], len(kinds) == 3
  config = read_json(folder / subfolder / "config.json")
  modes = config.get("pooling_mode")
  if modes is None:
    flags = {_KEYS["mean"]: True} | config
    modes = [mode for mode, key in _KEYS.items() if flags.get(key)]
  modes = [modes] if isinstance(modes, str) else modes
  unknown = config.keys() - {*_KEYS.values(), *_SIZES, "pooling_mode", "include_prompt"}
  if not modes or any(config[key] for key in unknown):
    path = folder / subfolder / "config.json"
    raise UserError(f"{path}: no pooling known here is asked for: {config}")
  main = read_json(folder / _MAIN, default={})
  longest, lower = main.get("max_seq_length") or 0, main.get("do_lower_case", False)
  include_prompt = config.get("include_prompt", True)
  return Pooling(tuple(modes), normalize, _prompt(folder), include_prompt, longest, lower)


def _prompt(folder: Path) -> str:
  config = read_json(folder / _PROMPTS, default={})
  name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
  if name is None:
    return ""
  if name not in prompts:
    raise UserError(f"{folder / _PROMPTS}: there is no prompt {name!r} among {sorted(prompts)}")
  return prompts[name]


def write(pooling: Pooling, folder: Path, width: int):
  """Writes the files that `read` reads, for sentence-transformers."""
  if pooling.refused or "pooler" in pooling.modes:
    return
  kinds = _MODULES if pooling.normalize else _MODULES[:2]
  paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
  modules = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
  ]
  for path in paths:
    (folder / path).mkdir(exist_ok=True)
  write_json(folder / "modules.json", modules)
  config = {key: mode in pooling.modes for mode, key in _KEYS.items()}
  config |= {_SIZES[0]: width, "include_prompt": pooling.include_prompt}
  write_json(folder / paths[1] / "config.json", config)
  main = {"max_seq_length": pooling.longest or None, "do_lower_case": pooling.lower}
  write_json(folder / _MAIN, main)
  if pooling.prompt:
    prompts = {"prompts": {"default": pooling.prompt}, "default_prompt_name": "default"}
    write_json(folder / _PROMPTS, prompts)
