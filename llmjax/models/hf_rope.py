"""Rotary positions and kinds of layers in a `config.json`, which no table of keys can say.

transformers 5 writes `rope_parameters`, versions before it `rope_theta` and `rope_scaling`; both
are read, and the older words, which all versions understand, are written.
"""

import math

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.hf_canonical import READ, shortest_pattern
from llmjax.models.hf_family import Part

SCALINGS = ("default", "linear", "llama3", "yarn")
# Ours → theirs; the other values of a scaling are called alike.
WORDS = {"original_context": "original_max_position_embeddings"}
KINDS = {"full_attention": "full", "sliding_attention": "window"}


def rope(
  theta_key: str = "rope_theta",
  fraction_key: str = "",
  fraction: float = 1.0,
  scalings: tuple = SCALINGS,
) -> Part:
  """Rotary positions of a family.

  Args:
    theta_key: their name of the base.
    fraction_key: their name of the share of channels that turn; empty where all do.
    fraction: that share where the key is absent.
    scalings: the rope types that the family knows.
  """

  def read(theirs, values):
    scaling = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or theirs.get(theta_key) or 10_000.0
    share = scaling.pop("partial_rotary_factor", None)
    share = share or theirs.get(fraction_key or "partial_rotary_factor") or fraction
    if share != 1 and not fraction_key:
      raise UserError(f"partial_rotary_factor={share!r} is not supported in this family")
    made = {"position.theta": theta, "position.fraction": share}
    context = theirs.get("original_max_position_embeddings") or values["context"]
    return made | _read_scaling(scaling, scalings, context, values["context"])

  def write(config):
    made = {theta_key: config.position.theta} | _write_scaling(config, scalings)
    return made | ({fraction_key: config.position.fraction} if fraction_key else {})

  keys = (theta_key, "rope_scaling", "rope_parameters", "original_max_position_embeddings")
  return Part((*keys, fraction_key or "partial_rotary_factor"), read, write)


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


def _write_scaling(config: ModelConfig, scalings: tuple) -> dict:
  position = config.position
  if position.kind != "rope":
    raise UserError(f"its position.kind is 'rope', not {position.kind!r}")
  if position.scaling == "none":
    return {}
  if position.scaling not in scalings:
    raise UserError(f"it has no rope scaling {position.scaling!r}")
  words = {WORDS.get(ours, ours): getattr(position, ours) for ours in READ[position.scaling]}
  if not position.attention_factor:
    words.pop("attention_factor", None)
  return {"rope_scaling": {"rope_type": position.scaling, **words}}


def _read_gemma3_rope(theirs, values):
  both = theirs.get("rope_parameters") or {}
  scaling = dict(both.get("full_attention") or theirs.get("rope_scaling") or {})
  local = dict(both.get("sliding_attention") or {})
  theta = scaling.pop("rope_theta", None) or theirs.get("rope_theta") or 1_000_000.0
  local_theta = local.pop("rope_theta", None) or theirs.get("rope_local_base_freq") or 10_000.0
  if local.get("rope_type", "default") != "default":
    raise UserError(f"rope type {local['rope_type']!r} in window layers is not supported")
  made = {"position.theta": theta, "position.local_theta": local_theta}
  return made | _read_scaling(scaling, SCALINGS, values["context"], values["context"])


def _write_gemma3_rope(config):
  position = config.position
  windows = "window" in config.attention.pattern
  if position.scaling != "none" and windows and not position.local_theta:
    raise UserError("it does not scale the positions of window layers")
  local = position.local_theta or position.theta
  made = {"rope_theta": position.theta, "rope_local_base_freq": local}
  return made | _write_scaling(config, SCALINGS)


GEMMA3_ROPE = Part(
  ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"),
  _read_gemma3_rope,
  _write_gemma3_rope,
)


def _layers(theirs: dict, slides: list, size) -> dict:
  """Pattern and window by `layer_types`, or where it is silent by which layers slide."""
  kinds = ["sliding_attention" if each else "full_attention" for each in slides]
  kinds = theirs.get("layer_types") or kinds
  unknown = [kind for kind in kinds if kind not in KINDS]
  if unknown:
    raise UserError(f"layer_types with {unknown[0]!r} is not supported; known: {', '.join(KINDS)}")
  pattern = shortest_pattern([KINDS[kind] for kind in kinds])
  if "window" not in pattern:
    return {"attention.pattern": pattern}
  if not size:
    raise UserError("layer_types has sliding_attention, but there is no sliding_window")
  return {"attention.pattern": pattern, "attention.window": size}


def _kinds(config: ModelConfig) -> list:
  words = {ours: word for word, ours in KINDS.items()}
  pattern = config.attention.pattern
  if "sparse" in pattern:
    raise UserError("it has no sparse layers")
  return [words[pattern[i % len(pattern)]] for i in range(config.layers)]


def window(default: int | None) -> Part:
  """`sliding_window` in every layer, or none; `default` where the key is absent."""

  def read(theirs, values):
    size = theirs.get("sliding_window", default)
    return _layers(theirs, [size] * values["layers"], size)

  def write(config):
    if len(set(_kinds(config))) > 1:
      raise UserError("its layers are all of one kind")
    return {"sliding_window": config.attention.window or None}

  return Part(("sliding_window", "layer_types"), read, write)


def _read_qwen(theirs, values):
  size = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None
  full = theirs.get("max_window_layers", 28) if size else values["layers"]
  return _layers(theirs, [i >= full for i in range(values["layers"])], size)


def _write_qwen(config):
  kinds = _kinds(config)
  return {
    "use_sliding_window": "sliding_attention" in kinds,
    "sliding_window": config.attention.window or None,
    "max_window_layers": (*kinds, "sliding_attention").index("sliding_attention"),
    "layer_types": kinds,
  }


QWEN_LAYERS = Part(
  ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
  _read_qwen,
  _write_qwen,
)


def gemma_layers(period: int) -> Part:
  """Window layers, every `period`-th full, unless `layer_types` says otherwise."""

  def read(theirs, values):
    every = theirs.get("sliding_window_pattern") or theirs.get("_sliding_window_pattern") or period
    slides = [(i + 1) % every for i in range(values["layers"])]
    return _layers(theirs, slides, theirs.get("sliding_window", 4096))

  def write(config):
    made = {"sliding_window": config.attention.window or 4096, "layer_types": _kinds(config)}
    return made if period == 2 else made | {"sliding_window_pattern": period}

  keys = ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")
  return Part(keys, read, write)
