"""Rotary positions in a `config.json`: transformers 5 writes `rope_parameters`, versions before it
`rope_theta` and `rope_scaling`. Both are read, the older keys are written."""

import math

from llmjax.core.errors import UserError, note
from llmjax.formats.hf.canonical import READ
from llmjax.formats.hf.family import Codec
from llmjax.formats.hf.layers import FULL, KINDS, SLIDING
from llmjax.models.config import ModelConfig

ORIGINAL = "original_max_position_embeddings"
# What transformers reads of each rope type, beside the base and the fraction.
TYPES = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
  "yarn": (
    "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ORIGINAL,
  ),
  "longrope": ("short_factor", "long_factor", "factor", "attention_factor", ORIGINAL),
}
# How many of them have no default; a yarn or longrope without factor has that of the two contexts.
NEEDED = {"linear": 1, "dynamic": 1, "llama3": 3, "longrope": 2}
# Keys of another type, or of none: transformers passes over them.
UNREAD = {"finetuned", "attn_factor"}.union(*TYPES.values())
# Field of `PositionConfig` → key of the block, where they differ.
RENAMED = {"original_context": ORIGINAL}


def rope(
  theta_key: str = "rope_theta",
  theta: float = 10_000.0,
  local_key: str = "",
  fraction_key: str = "",
  fraction: float = 1.0,
  kinds: dict | None = None,
  original: int | None = None,
  elsewhere: tuple = (),
) -> Codec:
  """Rotary positions of a family.

  Args:
    theta_key: the base's key.
    theta: the base where the key is absent.
    local_key: the key of the base in window layers; empty where that is the same.
    fraction_key: the key of the rotary fraction of a head; empty where all channels turn.
    fraction: that fraction where the key is absent.
    kinds: the rope types that the family knows → what they mean; by default all of `TYPES`.
    original: the context before the stretch where the config does not say it outside the block;
      None: what the block says, or else the context.
    elsewhere: keys of the block that another codec of the family reads, whatever the type.
  """
  kinds = kinds or {kind: kind for kind in TYPES}
  share_key = fraction_key or "partial_rotary_factor"

  def read(raw, fields):
    scaling, local = _blocks(raw, nested=bool(local_key))
    share = _first(scaling.pop("partial_rotary_factor", None), raw.get(share_key), fraction)
    if share != 1 and not fraction_key:
      raise UserError(f"partial_rotary_factor={share!r} is not supported in this family")
    base = _first(scaling.pop("rope_theta", None), raw.get(theta_key), theta)
    found = {"position.theta": base, "position.fraction": share}
    if local_key:
      found["position.local_theta"] = _first(local.get("rope_theta"), raw.get(local_key), 10_000.0)
    kind = _kind(scaling, kinds, elsewhere)
    context = fields["max_seq_len"]
    outside = None if local_key else raw.get(ORIGINAL)
    before = _first(outside, original, scaling.get(ORIGINAL), context)
    found |= _read_scaling(kind, scaling, before, context)
    if kind == "linear" and not local_key:  # Gemma 3 gives the context after the stretch
      found["max_seq_len"] = int(context * found["position.factor"])
    return found

  def write(config):
    position = config.position
    keys = {theta_key: position.theta, local_key: position.local_theta or position.theta}
    keys |= {fraction_key: position.fraction} | _write_scaling(config)
    if position.scaling == "linear" and not local_key:
      keys["max_position_embeddings"] = math.ceil(config.max_seq_len / position.factor)
    return {key: value for key, value in keys.items() if key}

  keys = (theta_key, local_key, share_key, "rope_scaling", "rope_parameters", ORIGINAL)
  return Codec(keys, read, write)


def _first(*values):
  return next(value for value in values if value is not None)


def _blocks(raw: dict, nested: bool) -> tuple[dict, dict]:
  """The rope parameters of full layers and of window layers, where those are `nested`.
  `rope_scaling` is read before `rope_parameters`; nested ones it adds to."""
  new, old = (raw.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
  full, local = (new.get(FULL) or {}, new.get(SLIDING) or {}) if nested else (new, {})
  for block in (new, old, full, local):
    if not isinstance(block, dict):
      raise UserError(f"rope parameters are a table of values, not {block!r}")
  if nested:
    unknown = (new.keys() - KINDS) | (local.keys() - {"rope_type", "rope_theta"})
    if unknown or local.get("rope_type", "default") != "default":
      raise UserError(f"rope_parameters={new!r} are not supported; known: plain ones in windows")
    return {"rope_type": "default", **full, **old}, local
  if new and old:
    note("rope_parameters is left out: rope_scaling is there as well and comes first")
  return dict(old or new), {}


def _kind(scaling: dict, kinds: dict, elsewhere: tuple) -> str:
  """Takes the rope type out of a block, which has to have what that type needs and no more."""
  names = [scaling.pop(key, None) for key in ("rope_type", "type")]
  names = [name for name in names if name is not None]
  found = {kinds.get(name, name) for name in names} or {"default"}
  kind = next(iter(found))
  if len(found) > 1 or kind not in TYPES or kind not in kinds.values():
    named = " beside ".join(map(repr, names))
    raise UserError(f"rope type {named} is not supported; known: {', '.join(kinds)}")
  for key in TYPES[kind][: NEEDED.get(kind, 0)]:
    if scaling.get(key) is None:
      raise UserError(f"rope type {kind!r} has no {key!r}")
  unread = [key for key in scaling if key not in (*TYPES[kind], *elsewhere)]
  for key in unread:
    if key not in UNREAD:
      raise UserError(f"rope type {kind!r} with {key!r} is not supported")
  if unread:
    note(f"rope type {kind!r} does not read {', '.join(unread)}, in transformers either")
  return kind


def _read_scaling(kind: str, scaling: dict, original: int, context: int) -> dict:
  """Reads a block of a kind, `original` being the context before the stretch."""
  scaling = scaling | {ORIGINAL: original}
  for key in scaling.keys() & TYPES[kind]:
    wanted = list | None if key in ("short_factor", "long_factor") else int | float | None
    if not isinstance(scaling[key], wanted):
      raise UserError(f"rope type {kind!r} with {key}={scaling[key]!r} is not supported")
  if kind == "dynamic":
    note(f"dynamic scaling begins behind {context} positions, which are the most that are read")
  if kind in ("default", "dynamic"):
    return {}
  scaling = {key: value for key, value in scaling.items() if value is not None}
  scaling.setdefault("factor", max(context / max(original, 1), 1.0))
  if scaling.get("attention_factor") == 0:
    raise UserError(f"rope type {kind!r} with attention_factor=0 is not supported")
  found = {"position.scaling": kind, "max_seq_len": context}
  if kind == "yarn":
    _read_mscale(scaling)
    found["max_seq_len"] = max(context, int(scaling["factor"] * original))
  if kind == "longrope":
    short, long = (scaling.get(key) or [] for key in ("short_factor", "long_factor"))
    if len(short) != len(long):
      raise UserError(f"{len(short)} short_factor are beside {len(long)} long_factor")
    scaling["divisors"] = (*short, *long)
  keys = {field: RENAMED.get(field, field) for field in READ[kind]}
  return found | {f"position.{f}": scaling[key] for f, key in keys.items() if key in scaling}


def _read_mscale(scaling: dict):
  """Resolves the keys that DeepSeek's variant of yarn adds."""
  if scaling.get("truncate") is False:
    raise UserError("rope type 'yarn' with truncate=False is not supported")
  one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if one and all_dims and "attention_factor" not in scaling and scaling["factor"] > 1:
    stretch = 0.1 * math.log(scaling["factor"])
    scaling["attention_factor"] = (one * stretch + 1) / (all_dims * stretch + 1)


def _write_scaling(config: ModelConfig) -> dict:
  position = config.position
  if position.scaling == "none":
    return {}
  block = {"rope_type": position.scaling}
  block |= {RENAMED.get(f, f): getattr(position, f) for f in READ[position.scaling]}
  if not position.attention_factor:
    block.pop("attention_factor", None)
  if position.scaling != "longrope":
    return {"rope_scaling": block}
  divisors, pairs = list(block.pop("divisors")), len(position.divisors) // 2
  block |= {"short_factor": divisors[:pairs], "long_factor": divisors[pairs:]}
  if position.factor == max(config.max_seq_len / position.original_context, 1.0):
    block.pop("factor")  # older versions know none but this
  return {"rope_scaling": block, ORIGINAL: position.original_context}
