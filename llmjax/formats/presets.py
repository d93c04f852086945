"""Published architectures by name: their `config.json`, where it differs from the defaults of the
family. `config.model = editable(preset("Mixtral-8x7B"))` in a config file takes one over."""

import dataclasses

from llmjax.core.errors import UserError, nearest
from llmjax.formats.hf import folder as hf
from llmjax.models.config import ModelConfig


def _config(model_type, layers, width, heads, kv_heads, vocab, mlp, theta, context, **more) -> dict:
  return {
    "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width,
    "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
    "intermediate_size": mlp, "rope_theta": theta, "max_position_embeddings": context, **more,
  }


def _llama(*numbers, **more) -> dict:
  return _config("llama", *numbers, rms_norm_eps=1e-5, **more)


def _qwen(*numbers, width) -> dict:
  more = {"head_dim": 128, "norm_topk_prob": True, "moe_intermediate_size": width}
  return _config("qwen3_moe", *numbers, 1e6, 40_960, **more)


def _deepseek(version, *numbers, mscale, **more) -> dict:
  scaling = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
  }
  return _config(f"deepseek_{version}", *numbers, 10_000, 163_840, rope_scaling=scaling, **more)


_LLAMA_3_1 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
PRESETS = {
  "Llama-2-7B": _llama(32, 4096, 32, 32, 32_000, 11_008, 10_000, 4096),
  "Llama-3-8B": _llama(32, 4096, 32, 8, 128_256, 14_336, 500_000, 8192),
  "Llama-3-70B": _llama(80, 8192, 64, 8, 128_256, 28_672, 500_000, 8192),
  "Llama-3-405B": _llama(  # there is no Llama 3 of this size: these are the values of Llama 3.1
    126, 16_384, 128, 8, 128_256, 53_248, 500_000, 131_072, rope_scaling=_LLAMA_3_1
  ),
  "Mixtral-8x7B": _config("mixtral", 32, 4096, 32, 8, 32_000, 14_336, 1e6, 32_768),
  "Qwen3-30B-A3B": _qwen(48, 2048, 32, 4, 151_936, 6144, width=768),
  "Qwen3-235B-A22B": _qwen(94, 4096, 64, 4, 151_936, 12_288, width=1536),
  "OLMoE-1B-7B": _config("olmoe", 16, 2048, 16, 16, 50_304, 1024, 10_000, 4096),
  "DeepSeek-V2-Lite": _deepseek(
    "v2", 27, 2048, 16, 16, 102_400, 10_944, mscale=0.707, q_lora_rank=None,
    num_experts_per_tok=6, first_k_dense_replace=1, moe_intermediate_size=1408,
  ),
  "DeepSeek-V2": _deepseek(
    "v2", 60, 5120, 128, 128, 102_400, 12_288, mscale=0.707, n_routed_experts=160,
    num_experts_per_tok=6, first_k_dense_replace=1, moe_intermediate_size=1536,
    topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
  ),
  "DeepSeek-V3": _deepseek("v3", 61, 7168, 128, 128, 129_280, 18_432, mscale=1.0),
}


def preset(name: str) -> ModelConfig:
  """Looks up a published architecture, to be computed in bfloat16.

  Raises:
    UserError: an unknown name.
  """
  if name not in PRESETS:
    raise UserError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
  read = hf.read_config(hf.family_of(PRESETS[name]), PRESETS[name], quiet=True)
  return dataclasses.replace(read, dtype="bfloat16")
