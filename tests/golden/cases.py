"""The families and variants whose logits are held against transformers: class and config of each.

Sizes are odd on purpose: heads share keys, head widths differ from width / heads, and windows are
shorter than the rows.
"""

SMALL = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "vocab_size": 37,
  "max_position_embeddings": 32,
  "pad_token_id": None,
  "bos_token_id": 3,
  "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 6}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TEXT = {"bos_token_id": 3, "eos_token_id": 2, "vocab_size": 37}
T5 = TEXT | {
  "d_model": 16,
  "d_kv": 6,
  "d_ff": 24,
  "num_heads": 3,
  "num_layers": 2,
  "num_decoder_layers": 3,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 10,
  "pad_token_id": 0,
}
MARIAN = TEXT | {
  "d_model": 16,
  "encoder_layers": 2,
  "decoder_layers": 3,
  "encoder_attention_heads": 4,
  "decoder_attention_heads": 4,
  "encoder_ffn_dim": 24,
  "decoder_ffn_dim": 24,
  "max_position_embeddings": 32,
  "activation_function": "swish",
  "pad_token_id": 0,
  "decoder_start_token_id": 0,
}
BERT = SMALL | {"pad_token_id": 0, "layer_norm_eps": 1e-12, "type_vocab_size": 3}
VISION = {
  "hidden_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 20,
  "image_size": 8,
  "patch_size": 4,
}


def _rope(**values):
  return {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"} | values}


DEEPSEEK = SMALL | {
  "num_key_value_heads": 4,
  "first_k_dense_replace": 1,
  "q_lora_rank": None,
  "kv_lora_rank": 8,
  "qk_rope_head_dim": 4,
  "qk_nope_head_dim": 6,
  "v_head_dim": 5,
  "n_routed_experts": 4,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 8,
  "n_shared_experts": 2,
  "routed_scaling_factor": 1.5,
}
YARN = _rope(
  rope_type="yarn", factor=4.0, original_max_position_embeddings=8, mscale=0.707,
  mscale_all_dim=0.707, beta_fast=4.0, beta_slow=0.5,
)
# name → (transformers' class, config); the class's name without its suffix is that of the config.
CASES = {
  "gpt2": (
    "GPT2LMHeadModel",
    TEXT | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32},
  ),
  "llama": ("LlamaForCausalLM", WIDE_HEADS),
  "llama_biases": (
    "LlamaForCausalLM",
    GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
  ),
  "llama3": (
    "LlamaForCausalLM",
    WIDE_HEADS
    | _rope(
      rope_type="llama3",
      factor=4.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  "llama_linear": ("LlamaForCausalLM", WIDE_HEADS | _rope(rope_type="linear", factor=2.0)),
  "llama_yarn": (
    "LlamaForCausalLM",
    WIDE_HEADS
    | _rope(
      rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5
    ),
  ),
  "mistral": ("MistralForCausalLM", WIDE_HEADS | {"sliding_window": None}),
  "mistral_window": ("MistralForCausalLM", WIDE_HEADS | {"sliding_window": 5}),
  "qwen2": ("Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}),
  "qwen2_window": (
    "Qwen2ForCausalLM",
    GROUPED
    | {
      "num_hidden_layers": 3,
      "use_sliding_window": True,
      "sliding_window": 5,
      "max_window_layers": 2,
    },
  ),
  "qwen3": ("Qwen3ForCausalLM", WIDE_HEADS),
  "gemma2": (
    "Gemma2ForCausalLM",
    WIDE_HEADS | {"num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 9},
  ),
  "gemma3": (
    "Gemma3ForCausalLM",
    WIDE_HEADS
    | {
      "num_hidden_layers": 5,
      "sliding_window": 5,
      "sliding_window_pattern": 3,
      "query_pre_attn_scalar": 9,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    },
  ),
  "olmo2": ("Olmo2ForCausalLM", GROUPED),
  "gpt_neox": ("GPTNeoXForCausalLM", SMALL | {"rotary_pct": 0.5}),
  "gpt_neox_sequential": (
    "GPTNeoXForCausalLM",
    SMALL | {"use_parallel_residual": False, "rotary_pct": 0.75},  # 3 of 4 channels: all turn
  ),
  "phi3": ("Phi3ForCausalLM", GROUPED | {"sliding_window": 5}),
  "phi3_longrope": (
    "Phi3ForCausalLM",
    GROUPED
    | {
      "num_attention_heads": 2,
      "partial_rotary_factor": 0.5,
      "original_max_position_embeddings": 8,
      "rope_parameters": {
        "rope_theta": 500.0,
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 5.0],
      },
    },
  ),
  "mixtral": (
    "MixtralForCausalLM",
    WIDE_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
  ),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    WIDE_HEADS | EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
  ),
  "olmoe": (
    "OlmoeForCausalLM",
    GROUPED | {"num_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 12},
  ),
  "deepseek_v3": (
    "DeepseekV3ForCausalLM",
    DEEPSEEK
    | {
      "q_lora_rank": 12,
      "n_routed_experts": 8,
      "n_group": 4,
      "topk_group": 2,
      "rms_norm_eps": 0.01,  # the latents' norms keep 1e-6
    },
  ),
  "deepseek_v3_half": (
    "DeepseekV3ForCausalLM",
    DEEPSEEK
    | YARN
    | {"rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
  ),
  "deepseek_v2": (
    "DeepseekV2ForCausalLM", DEEPSEEK | {"first_k_dense_replace": 0, "num_hidden_layers": 1},
  ),
  "deepseek_v2_groups": (
    "DeepseekV2ForCausalLM",
    DEEPSEEK
    | YARN
    | {"q_lora_rank": 12, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
  ),
  "bert": ("BertForMaskedLM", BERT),
  "roberta": ("RobertaForMaskedLM", BERT | {"pad_token_id": 1, "type_vocab_size": 1}),
  "t5": ("T5ForConditionalGeneration", T5),
  "t5_gated": (
    "T5ForConditionalGeneration",
    T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  ),
  "marian": ("MarianMTModel", MARIAN | {"scale_embedding": True}),
  "marian_apart": (
    "MarianMTModel",
    MARIAN
    | {"vocab_size": 41, "decoder_vocab_size": 37, "share_encoder_decoder_embeddings": False},
  ),
  "vit": ("ViTForImageClassification", VISION | {"num_labels": 5}),
  "llava": (
    "LlavaForConditionalGeneration",
    {
      "vision_config": VISION | {"model_type": "clip_vision_model"},
      "text_config": GROUPED | {"model_type": "llama"},
      "image_token_index": 36,
    },
  ),
}
