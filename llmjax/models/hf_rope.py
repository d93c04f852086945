"""Rotary positions and kinds of layers in a `config.json`, which no table of keys can say.

transformers 5 writes `rope_parameters`, versions before it `rope_theta` and `rope_scaling`; both
are read, and the older words, which all versions understand, are written.
"""

import math
from collections.abc import Callable

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.hf_canonical import READ, layer_kinds, shortest_pattern
from llmjax.models.hf_family import Part
from llmjax.nn.position import PositionConfig

SCALINGS = ("default", "linear", "llama3", "yarn")
# Ours → theirs; the other values of a scaling are called alike.
WORDS = {"original_context": "original_max_position_embeddings"}
FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = {FULL: "full", SLIDING: "window"}


def rope(
  theta_key: str = "rope_theta",
  theta: float = 10_000.0,
  local_key: str = "",
  fraction_key: str = "",
  fraction: float = 1.0,
  scalings: tuple = SCALINGS,
) -> Part:
  """Rotary positions of a family.

  Args:
    theta_key: their name of the base.
    theta: the base where the key is absent.
    local_key: their name of the base in window layers; empty where that is the same.
    fraction_key: their name of the share of channels that turn; empty where all do.
    fraction: that share where the key is absent.
    scalings: the rope types that the family knows.
  """

  def read(theirs, values):
    given, local = theirs.get("rope_parameters") or {}, {}
    if local_key:
      given, local = given.get(FULL) or {}, given.get(SLIDING) or {}
    scaling = dict(given or theirs.get("rope_scaling") or {})
    base = scaling.pop("rope_theta", None) or theirs.get(theta_key) or theta
    share = scaling.pop("partial_rotary_factor", None)
    share = share or theirs.get(fraction_key or "partial_rotary_factor") or fraction
    if share != 1 and not fraction_key:
      raise UserError(f"partial_rotary_factor={share!r} is not supported in this family")
    made = {"position.theta": base, "position.fraction": share}
    if local.get("rope_type", "default") != "default":
      raise UserError(f"rope type {local['rope_type']!r} in window layers is not supported")
    if local_key:
      local_theta = local.get("rope_theta") or theirs.get(local_key) or 10_000.0
      made["position.local_theta"] = local_theta
    context = theirs.get("original_max_position_embeddings") or values["context"]
    return made | _read_scaling(scaling, scalings, context, values["context"])

  def write(config):
    position = config.position
    made = {theta_key: position.theta, local_key: position.local_theta or position.theta}
    made |= {fraction_key: position.fraction} | _write_scaling(position)
    return {key: value for key, value in made.items() if key}

  keys = (theta_key, local_key, "rope_scaling", "rope_parameters")
  keys += ("original_max_position_embeddings", fraction_key or "partial_rotary_factor")
  return Part(keys, read, write)


def _read_scaling(scaling: dict, scalings: tuple, original: int, context: int) -> dict:
  """Reads what is left of rope parameters without base and share."""
  old_name = scaling.pop("type", None)
  kind = scaling.pop("rope_type", None) or old_name or "default"
  if kind not in scalings:
    raise UserError(f"rope type {kind!r} is not supported; known: {', '.join(scalings)}")
  if kind == "default":
    return {}
  if kind == "yarn":
    _read_yarn(scaling, original, context)
  made = {"position.scaling": kind}
  for ours in READ[kind]:
    value = scaling.pop(WORDS.get(ours, ours), None)
    if value is None and ours == "original_context":
      value = original
    if value is not None:
      made[f"position.{ours}"] = value
  if scaling:
    raise UserError(f"rope type {kind!r} with {next(iter(scaling))!r} is not supported")
  return made


def _read_yarn(scaling: dict, original: int, context: int):
  """Resolves the words that DeepSeek's variant of yarn adds."""
  if scaling.pop("truncate", True) is False:
    raise UserError("rope type 'yarn' with truncate=False is not supported")
  if scaling.get("factor") is None:
    scaling["factor"] = context / (scaling.get("original_max_position_embeddings") or original)
  one, all_dims = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
  if one and all_dims and not scaling.get("attention_factor") and scaling["factor"] > 1:
    stretch = 0.1 * math.log(scaling["factor"])
    scaling["attention_factor"] = (one * stretch + 1) / (all_dims * stretch + 1)


def _write_scaling(position: PositionConfig) -> dict:
  if position.scaling == "none":
    return {}
  words = {WORDS.get(ours, ours): getattr(position, ours) for ours in READ[position.scaling]}
  if not position.attention_factor:
    words.pop("attention_factor", None)
  return {"rope_scaling": {"rope_type": position.scaling, **words}}


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
  return _layers(
    "",
    lambda theirs: theirs.get("sliding_window", default),
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
  """Window layers, every `period`-th full, unless `layer_types` says otherwise."""

  def slides(theirs, size, i):
    every = theirs.get("sliding_window_pattern") or theirs.get("_sliding_window_pattern") or period
    return (i + 1) % every

  def write(config):
    made = {"sliding_window": config.attention.window or 4096, "layer_types": _kinds(config)}
    return made if period == 2 else made | {"sliding_window_pattern": period}

  keys = "sliding_window_pattern _sliding_window_pattern"
  return _layers(keys, lambda theirs: theirs.get("sliding_window", 4096), slides, write)
