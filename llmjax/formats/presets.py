"""Published architectures by name: the values of their `config.json`, read as any other is.

`config.model = editable(preset("Mixtral-8x7B"))` in a config file takes one over whole.
"""

import dataclasses

from llmjax.core.errors import UserError, nearest
from llmjax.formats.hf import folder as hf
from llmjax.models.config import ModelConfig


def _yarn(mscale):
  return {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
  }


def _config(model_type, layers, width, heads, vocab, mlp, theta, **more):
  return {
    "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width,
    "num_attention_heads": heads, "vocab_size": vocab, "intermediate_size": mlp,
    "rope_theta": theta, "hidden_act": "silu", "tie_word_embeddings": False, **more,
  }


def _llama(layers, width, heads, vocab, mlp, theta, context, **more):
  more = {"num_key_value_heads": 8} | more
  return _config(
    "llama", layers, width, heads, vocab, mlp, theta, max_position_embeddings=context,
    rms_norm_eps=1e-5, attention_bias=False, **more,
  )


_LATENT = {
  "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
  "max_position_embeddings": 163_840, "rms_norm_eps": 1e-6, "attention_bias": False,
  "moe_layer_freq": 1,
}
_V2 = _LATENT | {
  "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
  "norm_topk_prob": False, "scoring_func": "softmax", "rope_scaling": _yarn(0.707),
}
_QWEN = {
  "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
  "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
  "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "use_sliding_window": False,
  "sliding_window": None, "attention_bias": False,
}
_LLAMA_3_1 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
PRESETS = {
  "Llama-2-7B": _llama(32, 4096, 32, 32_000, 11_008, 10_000, 4096, num_key_value_heads=32),
  "Llama-3-8B": _llama(32, 4096, 32, 128_256, 14_336, 500_000, 8192),
  "Llama-3-70B": _llama(80, 8192, 64, 128_256, 28_672, 500_000, 8192),
  "Llama-3-405B": _llama(  # there is no Llama 3 of this size: these are the values of Llama 3.1
    126, 16_384, 128, 128_256, 53_248, 500_000, 131_072, rope_scaling=_LLAMA_3_1
  ),
  "Mixtral-8x7B": _config(
    "mixtral", 32, 4096, 32, 32_000, 14_336, 1e6, num_key_value_heads=8, num_local_experts=8,
    num_experts_per_tok=2, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=None,
  ),
  "Qwen3-30B-A3B": _config(
    "qwen3_moe", 48, 2048, 32, 151_936, 6144, 1e6, **_QWEN, moe_intermediate_size=768,
    max_window_layers=48,
  ),
  "Qwen3-235B-A22B": _config(
    "qwen3_moe", 94, 4096, 64, 151_936, 12_288, 1e6, **_QWEN, moe_intermediate_size=1536,
    max_window_layers=94,
  ),
  "OLMoE-1B-7B": _config(
    "olmoe", 16, 2048, 16, 50_304, 1024, 10_000, num_key_value_heads=16, num_experts=64,
    num_experts_per_tok=8, norm_topk_prob=False, max_position_embeddings=4096, rms_norm_eps=1e-5,
    clip_qkv=None, attention_bias=False,
  ),
  "DeepSeek-V2-Lite": _config(
    "deepseek_v2", 27, 2048, 16, 102_400, 10_944, 10_000, **_V2, num_key_value_heads=16,
    q_lora_rank=None, n_routed_experts=64, moe_intermediate_size=1408, topk_method="greedy",
    n_group=1, topk_group=1, routed_scaling_factor=1.0,
  ),
  "DeepSeek-V2": _config(
    "deepseek_v2", 60, 5120, 128, 102_400, 12_288, 10_000, **_V2, num_key_value_heads=128,
    q_lora_rank=1536, n_routed_experts=160, moe_intermediate_size=1536,
    topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
  ),
  "DeepSeek-V3": _config(
    "deepseek_v3", 61, 7168, 128, 129_280, 18_432, 10_000, **_LATENT, num_key_value_heads=128,
    q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    moe_intermediate_size=2048, first_k_dense_replace=3, norm_topk_prob=True, n_group=8,
    topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=2.5,
    rope_scaling=_yarn(1.0), num_nextn_predict_layers=1,
  ),
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
