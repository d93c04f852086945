"""Rotary positions in a `config.json`, which no table of keys can say.

transformers 5 writes `rope_parameters`, versions before it `rope_theta` and `rope_scaling`; both
are read, and the older words, which all versions understand, are written.
"""

import math

from llmjax.core.errors import UserError, note
from llmjax.formats.hf.canonical import READ
from llmjax.formats.hf.family import Part
from llmjax.formats.hf.layers import FULL, KINDS, SLIDING
from llmjax.models.config import ModelConfig

ORIGINAL = "original_max_position_embeddings"
# What transformers reads of each rope type, but for the base and the share of channels.
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
# What is of another type, or of nobody: transformers passes over it.
UNREAD = {"finetuned", "attn_factor"}.union(*TYPES.values())
# Ours → theirs; the other values of a scaling are called alike.
WORDS = {"original_context": ORIGINAL}


def rope(
  theta_key: str = "rope_theta",
  theta: float = 10_000.0,
  local_key: str = "",
  fraction_key: str = "",
  fraction: float = 1.0,
  kinds: dict | None = None,
  original: int | None = None,
  elsewhere: tuple = (),
) -> Part:
  """Rotary positions of a family.

  Args:
    theta_key: their name of the base.
    theta: the base where the key is absent.
    local_key: their name of the base in window layers; empty where that is the same.
    fraction_key: their name of the share of channels that turn; empty where all do.
    fraction: that share where the key is absent.
    kinds: the rope types that the family knows → what they mean; by default all of `TYPES`.
    original: the context before the stretch where the config does not say it outside the block;
      None: what the block says, or else the context.
    elsewhere: keys of the block that another part of the family reads, whatever the type.
  """
  kinds = kinds or {kind: kind for kind in TYPES}

  def read(theirs, values):
    scaling, local = _blocks(theirs, nested=bool(local_key))
    share = scaling.pop("partial_rotary_factor", None)
    share = _first(share, theirs.get(fraction_key or "partial_rotary_factor"), fraction)
    if share != 1 and not fraction_key:
      raise UserError(f"partial_rotary_factor={share!r} is not supported in this family")
    base = _first(scaling.pop("rope_theta", None), theirs.get(theta_key), theta)
    made = {"position.theta": base, "position.fraction": share}
    if local_key:
      own = _first(local.get("rope_theta"), theirs.get(local_key), 10_000.0)
      made["position.local_theta"] = own
    kind = _kind(scaling, kinds, elsewhere)
    context = values["max_seq_len"]
    outside = None if local_key else theirs.get(ORIGINAL)
    before = _first(outside, original, scaling.get(ORIGINAL), context)
    made |= _read_scaling(kind, scaling, before, context)
    if kind == "linear" and not local_key:  # Gemma 3 gives the context after the stretch
      made["max_seq_len"] = int(context * made["position.factor"])
    return made

  def write(config):
    position = config.position
    made = {theta_key: position.theta, local_key: position.local_theta or position.theta}
    made |= {fraction_key: position.fraction} | _write_scaling(config)
    if position.scaling == "linear" and not local_key:
      made["max_position_embeddings"] = math.ceil(config.max_seq_len / position.factor)
    return {key: value for key, value in made.items() if key}

  keys = (theta_key, local_key, "rope_scaling", "rope_parameters", ORIGINAL)
  return Part((*keys, fraction_key or "partial_rotary_factor"), read, write)


def _first(*values):
  return next(value for value in values if value is not None)


def _blocks(theirs: dict, nested: bool) -> tuple[dict, dict]:
  """The rope parameters of full layers and of window layers, where those are `nested`.

  `rope_scaling` is read before `rope_parameters`; nested ones it adds to.
  """
  new, old = (theirs.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
  full, local = (new.get(FULL), new.get(SLIDING)) if nested else (new, {})
  for block in (new, old, full or {}, local or {}):
    if not isinstance(block, dict):
      raise UserError(f"rope parameters are a table of values, not {block!r}")
  if nested:
    stray = [key for key in new if key not in KINDS]
    stray += [key for key in local or () if key not in ("rope_type", "rope_theta")]
    if stray or (local or {}).get("rope_type", "default") != "default":
      raise UserError(f"rope_parameters={new!r} are not supported; known: plain ones in windows")
    return {"rope_type": "default", **(full or {}), **old}, local or {}
  if new and old:
    note("rope_parameters is left out: rope_scaling is there as well and comes first")
  return dict(old or new), {}


def _kind(scaling: dict, kinds: dict, elsewhere: tuple) -> str:
  """Takes the rope type out of a block, which has to have what that type needs and no more."""
  names = [scaling.pop(key, None) for key in ("rope_type", "type")]
  found = {kinds.get(name, name) for name in names if name is not None} or {"default"}
  kind = next(iter(found))
  if len(found) > 1 or kind not in TYPES or kind not in kinds.values():
    told = " beside ".join(repr(name) for name in names if name is not None)
    raise UserError(f"rope type {told} is not supported; known: {', '.join(kinds)}")
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
  for key, value in {**scaling, ORIGINAL: original}.items():
    wanted = list | None if key in ("short_factor", "long_factor") else int | float | None
    if key in TYPES[kind] and not isinstance(value, wanted):
      raise UserError(f"rope type {kind!r} with {key}={value!r} is not supported")
  if kind == "dynamic":
    note(f"dynamic scaling begins behind {context} positions, which are the most that are read")
  if kind in ("default", "dynamic"):
    return {}
  scaling = {ORIGINAL: original, "factor": max(context / max(original, 1), 1.0)} | {
    key: value for key, value in scaling.items() if value is not None and key != ORIGINAL
  }
  if scaling.get("attention_factor") == 0:
    raise UserError(f"rope type {kind!r} with attention_factor=0 is not supported")
  if kind == "yarn":
    _read_yarn(scaling)
  made = {"position.scaling": kind, "max_seq_len": context}
  if kind == "yarn":
    made["max_seq_len"] = max(context, int(scaling["factor"] * original))
  if kind == "longrope":
    short, long = (scaling.get(key) or [] for key in ("short_factor", "long_factor"))
    if len(short) != len(long):
      raise UserError(f"{len(short)} short_factor are beside {len(long)} long_factor")
    scaling["divisors"] = (*short, *long)
  for ours in READ[kind]:
    if WORDS.get(ours, ours) in scaling:
      made[f"position.{ours}"] = scaling[WORDS.get(ours, ours)]
  return made


def _read_yarn(scaling: dict):
  """Resolves the words that DeepSeek's variant of yarn adds."""
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
  words = {WORDS.get(ours, ours): getattr(position, ours) for ours in READ[position.scaling]}
  if not position.attention_factor:
    words.pop("attention_factor", None)
  made = {"rope_scaling": {"rope_type": position.scaling, **words}}
  if position.scaling == "longrope":
    divisors, pairs = list(words.pop("divisors")), len(position.divisors) // 2
    words |= {"short_factor": divisors[:pairs], "long_factor": divisors[pairs:]}
    if position.factor == max(config.max_seq_len / position.original_context, 1.0):
      words.pop("factor")  # older versions know none but this
    made = {"rope_scaling": {"rope_type": "longrope", **words}, ORIGINAL: position.original_context}
  return made
