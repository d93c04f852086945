"""transformers' own rotary modules, on configs of every family that has them, of every rope type.

With LLMJAX_WRITE_GOLDEN=1 `tests/golden/ropes.json` is written; otherwise it must be what it says.
"""

import copy
import importlib
import json
import os
import random

import numpy as np
import pytest

from llmjax.core.errors import UserError
from llmjax.formats.hf import folder as hf
from tests.formats.test_hf_rope import our_angles
from tests.golden import ropes

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="make test-oracle installs torch")
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

# Angles of at most 64 rad: fp32 roundings of the frequency (two) and of the product, on both sides.
ATOL = 64 * 6 * 2**-24


def their_angles(theirs, length):
  """(cosines, sines) of the last of `length` positions, one a channel pair."""
  config = CONFIG_MAPPING[theirs["model_type"]](**copy.deepcopy(theirs))
  module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
  name = type(config).__name__.removesuffix("Config").removesuffix("Text") + "RotaryEmbedding"
  rotary = getattr(module, name)(config)
  layer = {"layer_type": "full_attention"} if isinstance(rotary.rope_type, dict) else {}
  made = rotary(torch.zeros(1), torch.arange(length)[None], **layer)
  cos, sin = (made.real, made.imag) if torch.is_tensor(made) else made
  pairs = cos.shape[-1] if torch.is_tensor(made) else cos.shape[-1] // 2
  return np.array([cos[0, -1, :pairs].numpy(), sin[0, -1, :pairs].numpy()])


def test_golden_angles_are_those_of_transformers():
  said = {name: their_angles(ropes.config_of(name), ropes.ROPES[name][2]) for name in ropes.ROPES}
  if os.environ.get("LLMJAX_WRITE_GOLDEN"):
    lines = [
      f' "{name}": {json.dumps([[round(float(x), 8) for x in row] for row in each])}'
      for name, each in said.items()
    ]
    ropes.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  for name, each in said.items():
    np.testing.assert_allclose(ropes.kept()[name], each, rtol=0, atol=ATOL, err_msg=name)


BLOCKS = {
  "linear": {"factor": 3.0},
  "dynamic": {"factor": 3.0},
  "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ropes.ORIGINAL: 20},
  "yarn": {
    "factor": 4.0, "beta_fast": 9.0, "beta_slow": 0.7, "attention_factor": 1.2, "mscale": 0.7,
    "mscale_all_dim": 0.9, "truncate": True, ropes.ORIGINAL: 16, "finetuned": True,
  },
  "longrope": {
    "short_factor": ropes.SHORT, "long_factor": ropes.LONG, "factor": 3.0,
    "attention_factor": 1.2, ropes.ORIGINAL: 16,
  },
}
ROTARY = [
  "llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "gpt_neox", "phi3",
  "mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3",
]


def drawn(family, rng):
  """A config with parts of one rope block, or of two, and of the keys around them."""
  made = ropes.config_of("linear") | {"model_type": family, "head_dim": 8}
  made |= {"qk_rope_head_dim": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
  made |= {"rotary_pct": 1.0, "num_hidden_layers": 6}
  del made["rope_scaling"]
  around = {
    "rope_theta": 700.0, "rotary_emb_base": 900.0, ropes.ORIGINAL: 24, "rotary_pct": 0.5,
    "rope_local_base_freq": 300.0, "partial_rotary_factor": 1.0,
  }
  made |= {key: value for key, value in around.items() if rng.random() < 0.4}
  for block in ("rope_parameters", "rope_scaling"):
    if rng.random() < 0.6:
      kind = rng.choice(["longrope", "default"] if family == "phi3" else [*BLOCKS, "default"])
      values = {**BLOCKS.get(kind, {}), "rope_theta": 600.0}
      values = {key: value for key, value in values.items() if rng.random() < 0.85}
      inner = {rng.choice(["rope_type", "type"]): kind, **values}
      nested = family == "gemma3_text" and block == "rope_parameters"
      made[block] = {"full_attention": inner} if nested else inner
  return made


@pytest.mark.parametrize("family", ROTARY)
def test_what_we_read_of_any_block_is_what_transformers_does(family):
  rng, compared = random.Random(family), 0
  for _ in range(80):
    theirs, length = drawn(family, rng), rng.choice([12, 40])
    try:
      want = their_angles(theirs, length)
    except (KeyError, ValueError, TypeError, RuntimeError, StrictDataclassError):
      continue
    try:
      config = hf.read_config(hf.family_of(theirs), theirs)
    except UserError:
      continue
    np.testing.assert_allclose(our_angles(config, length), want, rtol=0, atol=ATOL, err_msg=theirs)
    compared += 1
  assert compared > 25
