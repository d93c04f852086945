"""transformers' models, written as GGUF files whose keys say as little as llama.cpp allows.

What a file leaves out is in transformers the default of the family, or is given to it here.
"""

import numpy as np
import pytest

import llmjax
from tests.formats.test_gguf_families import tensors
from tests.gguf_files import write

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="make test-oracle installs torch")
import transformers

SIZES = {
  "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
  "num_key_value_heads": 2, "vocab_size": 61, "head_dim": 6, "rms_norm_eps": 1e-6,
  "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
YARN_KEYS = {
  "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
  "rope.scaling.original_context_length": 8,
}
# GGUF's architecture, transformers' class, its config, the file's keys beside the sizes
CASES = {
  "linear": (
    "qwen2", "Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope.scale_linear": 4.0},
  ),
  "yarn": ("qwen2", "Qwen2ForCausalLM", {"rope_scaling": YARN}, YARN_KEYS),
  "gemma2": ("gemma2", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 6}, {}),
  "gemma3": (
    "gemma3", "Gemma3ForCausalLM",
    {
      "query_pre_attn_scalar": 6, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2
      + ["full_attention", "sliding_attention"], "rope_theta": 1e6, "rope_local_base_freq": 500.0,
    },
    {
      "attention.sliding_window": 5, "attention.sliding_window_pattern": 3, "rope.freq_base": 1e6,
      "rope.freq_base_swa": 500.0,
    },
  ),
  "olmo3": (
    "olmo2", "Olmo3ForCausalLM",
    {
      "sliding_window": 5, "rope_parameters": {
        "full_attention": YARN | {"rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
      },
    },
    {"attention.sliding_window": 5, "rope.freq_base": 500.0} | YARN_KEYS,
  ),
}


LONGROPE = {
  "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]
}
CASES["longrope"] = (
  "phi3", "Phi3ForCausalLM",
  {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8, "sliding_window": None},
  {
    "rope.scaling.original_context_length": 8, "rope.dimension_count": 6,
    "rope.scaling.attn_factor": 1.2909944,  # √(1 + ln(32 / 8) / ln 8)
  },
)


def keys(arch: str, more: dict) -> dict:
  sizes = {
    "block_count": 4, "context_length": 32, "embedding_length": 24, "feed_forward_length": 40,
    "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
  }
  return {f"{arch}.{key}": value for key, value in (sizes | more).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_says_little_gives_the_logits_of_the_model(name, tmp_path):
  arch, kind, values, more = CASES[name]
  model_class = getattr(transformers, kind)
  torch.manual_seed(0)
  config = model_class.config_class(**SIZES | values)
  config._attn_implementation = "eager"
  model = model_class(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.copy_(torch.randn_like(weight) * 0.5 + (weight.dim() == 1) * 0.5)
  model.save_pretrained(tmp_path)
  written = tensors(arch, tmp_path, 4)
  assert None not in written
  if name == "longrope":
    for kind in ("short", "long"):
      factors = LONGROPE[f"{kind}_factor"]
      written[f"rope_factors_{kind}.weight"] = np.array(factors, np.float32)
  write(tmp_path / "a.gguf", arch, keys(arch, more), written)
  file = llmjax.load(tmp_path / "a.gguf")
  ids = np.random.default_rng(0).integers(0, 61, (2, 30))
  for length in (30, 7):  # beyond the context before a stretch, and within it
    with torch.no_grad():
      want = model(torch.from_numpy(ids[:, :length])).logits.numpy()
    found = np.asarray(file.logits(ids[:, :length]))
    # fp32 on both sides: rounding over four layers, on logits that are of the order of 10.
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())
    assert np.std(want) > 0.1
