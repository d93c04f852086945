"""Proves that no value of the model's config goes untested: each stands in a variant that is
compared with the reference.

A new word in a tuple of choices, or a new key, fails here by name until a row of `variants.py` uses
it.
"""

import dataclasses
import typing

import pytest

from llmjax.models import build, config
from llmjax.models.config import ModelConfig
from llmjax.nn import mlp, moe, norm, position
from llmjax.nn.attention import config as attention
from llmjax.nn.position import SINUSOIDS
from tests.models.variants import VARIANTS, reference_config

CHOICES = {
  "kind": config.KINDS,
  "block": config.BLOCKS,
  "activation": mlp.ACTIVATIONS,
  "dtype": config.DTYPES,
  "remat": config.REMAT,
  "attention.pattern": attention.LAYERS,
  **{f"attention.{key}": known for key, known in attention.CHOICES.items()},
  "position.kind": position.KINDS,
  "position.layout": position.LAYOUTS,
  "position.scaling": position.SCALINGS,
  "norm.kind": norm.KINDS,
  "norm.place": norm.PLACES,
  "moe.router": moe.ROUTERS,
  "moe.drop": moe.DROPS,
  "vision.activation": ("gelu", "quick_gelu"),  # of the same functions as `activation`
}
# Kernels of other machines, of which tests/nn compares what can run here; what several devices do
# (tests/multidevice/test_context.py); what only generation reads
# (tests/serve/test_generate_kinds.py); weight kinds (tests/core/test_weight.py).
ELSEWHERE = {
  ("attention.kernel", "splash"),
  ("attention.kernel", "cudnn"),
  ("attention.context_parallel", "gather"),
  ("attention.context_parallel", "all_to_all"),
  ("embed.start_token", "another"),
  ("weights", "another"),
}


def fields(schema=ModelConfig, prefix=""):
  """Lists (dotted key, type, default) of a config and its sections."""
  hints = typing.get_type_hints(schema)
  for field in dataclasses.fields(schema):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from fields(hints[field.name], f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, hints[field.name], field.default


# Sizes and numbers that are not switched off by any value: it is enough that another one is used.
PLAIN = {
  "layers", "width", "heads", "mlp_width", "max_seq_len", "vocab_size", "kv_heads", "head_dim",
  "attention.sparse_block", "attention.block", "attention.latent.kv_rank",
  "attention.latent.rope_dim", "attention.latent.nope_dim", "attention.latent.value_dim",
  "position.theta", "position.low_freq_factor",
  "position.high_freq_factor", "position.beta_fast", "position.beta_slow", "position.buckets",
  "position.max_distance", "norm.eps", "vision.image_size", "vision.patch", "vision.channels",
  "vision.image_token", "vision.layers", "vision.width", "vision.heads", "vision.mlp_width",
  "vision.eps",
}


def has_tower(v) -> bool:
  return v["kind"] == "decoder" and v["vision.image_size"] > 0


# What a key needs to be read at all; a variant that only carries its value does not test it.
READ_IF = {
  "attention.window": lambda v: "window" in v["attention.pattern"],
  "attention.sparse": lambda v: "sparse" in v["attention.pattern"],
  "attention.block": lambda v: v["attention.kernel"] == "blockwise",
  "attention.latent": lambda v: v["attention.latent.kv_rank"] > 0,
  "position.theta": lambda v: rope(v) or v["position.kind"] in SINUSOIDS,
  "position.first": lambda v: v["position.kind"] in SINUSOIDS,
  "position.local_theta": lambda v: rope(v) and "window" in v["attention.pattern"],
  "position.fraction": lambda v: rope(v),
  "position.layout": lambda v: rope(v),
  "position.scaling": lambda v: rope(v),
  "position.factor": lambda v: v["position.scaling"] != "none",
  "position.original": lambda v: v["position.scaling"] in ("yarn", "llama3", "longrope"),
  "position.low_freq": lambda v: v["position.scaling"] == "llama3",
  "position.high_freq": lambda v: v["position.scaling"] == "llama3",
  "position.beta": lambda v: v["position.scaling"] == "yarn",
  "position.attention_factor": lambda v: v["position.scaling"] in ("yarn", "longrope"),
  "position.divisors": lambda v: v["position.scaling"] == "longrope",
  "position.buckets": lambda v: v["position.kind"] == "relative",
  "position.max": lambda v: v["position.kind"] == "relative",
  "vision.image_size": lambda v: True,
  "vision.image_token": has_tower,
  "vision.layers": has_tower,
  "vision.width": has_tower,
  "vision.heads": has_tower,
  "vision.mlp_width": has_tower,
  "vision.activation": has_tower,
  "vision.eps": has_tower,
  "vision.input_norm": has_tower,
  "vision.": lambda v: v["vision.image_size"] > 0,
  "moe.drop": lambda v: v["moe.capacity"] > 0 and v["moe.router"] in ("softmax", "sigmoid"),
  "moe.renormalize": lambda v: v["moe.experts"] > 0 and v["moe.router"] in ("softmax", "sigmoid"),
  "moe.": lambda v: v["moe.experts"] > 0,
  "encoder_layers": lambda v: v["kind"] == "encoder_decoder",
  "source_vocab_size": lambda v: v["kind"] == "encoder_decoder",
  "embed.": lambda v: v["kind"] != "vision" or v["embed.norm"],
  "tie_embeddings": lambda v: v["kind"] != "vision",
}


def rope(v) -> bool:
  return v["position.kind"] == "rope"


def wanted():
  """Lists (key, value) that must be used; of a number: off, and "another"."""
  for key, kind, default in fields():
    if key in CHOICES:
      yield from ((key, value) for value in CHOICES[key] if (key, value) not in ELSEWHERE)
    elif kind is bool:
      yield from ((key, value) for value in (False, True))
    else:
      values = ("another",) if key in PLAIN else (default, "another")
      yield from ((key, value) for value in values if (key, value) not in ELSEWHERE)


def users(key, value) -> list[str]:
  """Names the variants that use a value, where it is read."""
  default = {key: default for key, _, default in fields()}[key]
  read = next((test for start, test in READ_IF.items() if key.startswith(start)), lambda v: True)
  found = []
  for name, variant in VARIANTS.items():
    values = reference_config(variant)
    has = values[key]
    if key == "attention.pattern":
      used = value in has
    else:
      used = has != default if value == "another" else has == value
    off = value == default and not isinstance(value, str | bool)  # what is off is read nowhere
    found += [name] * (used and (off or read(values)))
  return found


def test_every_value_of_the_config_is_compared_with_the_reference():
  table = {(key, value): users(key, value) for key, value in wanted()}
  rows = {}
  for (key, value), names in table.items():
    rows.setdefault(key, []).append(f"{value} ({', '.join(names[:2])}, {len(names)})")
  print(f"{len(table)} values of ModelConfig in {len(VARIANTS)} variants; value (in, how many):")
  print("\n".join(f"  {key}: {'; '.join(values)}" for key, values in rows.items()))
  missing = [f"{key}={value}" for (key, value), names in table.items() if not names]
  assert not missing, f"no variant compared with the reference uses {', '.join(missing)}"


def test_the_choices_are_those_that_the_config_checks():
  """A key whose choices are unknown here would be let through: each refuses a word of none."""
  for key, kind, _ in fields():
    if kind is str:
      assert key in CHOICES, f"{key} has no tuple in CHOICES"
      with pytest.raises(Exception, match=f"model.{key} 'nonsense' is unknown"):
        _with(key, "nonsense")
  assert tuple(build.KINDS) == config.KINDS


def _with(key, value):
  section, _, name = key.rpartition(".")
  if not section:
    return ModelConfig(**{name: value})
  kind = typing.get_type_hints(ModelConfig)[section]
  return ModelConfig(**{section: kind(**{name: value})})
