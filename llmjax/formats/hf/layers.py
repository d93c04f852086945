"""Kinds of layers in a `config.json`, full attention and sliding windows."""

from collections.abc import Callable

from llmjax.core.errors import UserError
from llmjax.formats.hf.canonical import shortest_pattern
from llmjax.formats.hf.family import Codec
from llmjax.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = {FULL: "full", SLIDING: "window"}


def _layers(keys: tuple, size: Callable, slides: Callable, write: Callable) -> Codec:
  """Kinds of layers by `layer_types`, or where that is absent by `slides`.

  Args:
    keys: further keys that the two functions read.
    size: `config.json` → the window, if there is one.
    slides: (`config.json`, the window, number of a layer) → whether the layer has it.
    write: as in `Codec`.
  """

  def read(raw, fields):
    window = size(raw)
    default = [SLIDING if slides(raw, window, i) else FULL for i in range(fields["layers"])]
    kinds = raw.get("layer_types") or default
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

  return Codec(("sliding_window", "layer_types", *keys), read, write)


def _kinds(config: ModelConfig) -> list:
  names = {kind: name for name, kind in KINDS.items()}
  return [names.get(kind, kind) for kind in config.layer_kinds]


def window(default: int | None) -> Codec:
  """`sliding_window` in every layer, or none; `default` where the key is absent."""

  def size(raw):
    found = raw.get("sliding_window", default)
    kinds, kind = raw.get("layer_types") or (), SLIDING if found else FULL
    if set(kinds) - {kind}:  # transformers reads no layer_types in these families
      raise UserError(f"layer_types={kinds!r} beside sliding_window={found!r} is not supported")
    return found

  write = lambda config: {"sliding_window": config.attention.window or None}  # noqa: E731
  return _layers((), size, lambda raw, size, i: size, write)


def _write_qwen(config):
  kinds = _kinds(config)
  return {
    "use_sliding_window": SLIDING in kinds,
    "sliding_window": config.attention.window or None,
    "max_window_layers": (*kinds, SLIDING).index(SLIDING),
    "layer_types": kinds,
  }


QWEN_LAYERS = _layers(
  ("use_sliding_window", "max_window_layers"),
  lambda raw: raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None,
  lambda raw, size, i: size and i >= raw.get("max_window_layers", 28),
  _write_qwen,
)


def gemma_layers(period: int) -> Codec:
  """Window layers, every `period`-th full, unless `layer_types` or a Gemma 3 says otherwise."""
  pattern = {} if period == 2 else {"sliding_window_pattern": period}

  def slides(raw, size, i):
    return (i + 1) % (raw.get("sliding_window_pattern", period) if pattern else period)

  def write(config):
    window = config.attention.window or 4096
    return {"sliding_window": window, "layer_types": _kinds(config), **pattern}

  # transformers writes the key with an underscore, and never reads it
  keys = (*pattern, "_sliding_window_pattern")
  return _layers(keys, lambda raw: raw.get("sliding_window", 4096), slides, write)
