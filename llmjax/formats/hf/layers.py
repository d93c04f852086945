"""Kinds of layers in a `config.json`, full ones and windows, which no table of keys can say."""

from collections.abc import Callable

from llmjax.core.errors import UserError
from llmjax.formats.hf.canonical import layer_kinds, shortest_pattern
from llmjax.formats.hf.family import Part
from llmjax.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = {FULL: "full", SLIDING: "window"}


def _layers(keys: str, size: Callable, slides: Callable, write: Callable) -> Part:
  """Kinds of layers by `layer_types`, or where it is silent by `slides`.

  Args:
    keys: their further keys.
    size: their config → the window, if there is one.
    slides: (their config, that window, number of a layer) → whether the layer has it.
    write: as in `Part`.
  """

  def read(theirs, values):
    window = size(theirs)
    slide = [slides(theirs, window, i) for i in range(values["layers"])]
    kinds = theirs.get("layer_types") or [SLIDING if each else FULL for each in slide]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
      known = ", ".join(KINDS)
      raise UserError(f"layer_types with {unknown[0]!r} is not supported; known: {known}")
    pattern = shortest_pattern([KINDS[kind] for kind in kinds])
    if "window" not in pattern:
      return {"attention.pattern": pattern}
    if not window:
      raise UserError("layer_types has sliding_attention, but there is no sliding_window")
    return {"attention.pattern": pattern, "attention.window": window}

  return Part(("sliding_window", "layer_types", *keys.split()), read, write)


def _kinds(config: ModelConfig) -> list:
  words = {ours: word for word, ours in KINDS.items()}
  return [words.get(kind, kind) for kind in layer_kinds(config)]


def window(default: int | None) -> Part:
  """`sliding_window` in every layer, or none; `default` where the key is absent."""

  def size(theirs):
    found = theirs.get("sliding_window", default)
    kinds, kind = theirs.get("layer_types") or (), SLIDING if found else FULL
    if set(kinds) - {kind}:  # transformers reads no layer_types in these families
      raise UserError(f"layer_types={kinds!r} beside sliding_window={found!r} is not supported")
    return found

  return _layers(
    "",
    size,
    lambda theirs, size, i: size,
    lambda config: {"sliding_window": config.attention.window or None},
  )


def _write_qwen(config):
  kinds = _kinds(config)
  return {
    "use_sliding_window": SLIDING in kinds,
    "sliding_window": config.attention.window or None,
    "max_window_layers": (*kinds, SLIDING).index(SLIDING),
    "layer_types": kinds,
  }


QWEN_LAYERS = _layers(
  "use_sliding_window max_window_layers",
  lambda theirs: theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None,
  lambda theirs, size, i: size and i >= theirs.get("max_window_layers", 28),
  _write_qwen,
)


def gemma_layers(period: int) -> Part:
  """Window layers, every `period`-th full, unless `layer_types` or a Gemma 3 says otherwise."""
  key = "" if period == 2 else "sliding_window_pattern"

  def slides(theirs, size, i):
    return (i + 1) % theirs.get(key, period)

  def write(config):
    made = {"sliding_window": config.attention.window or 4096, "layer_types": _kinds(config)}
    return made | ({key: period} if key else {})

  keys = f"{key} _sliding_window_pattern"  # the latter is written by transformers, and never read
  return _layers(keys, lambda theirs: theirs.get("sliding_window", 4096), slides, write)
