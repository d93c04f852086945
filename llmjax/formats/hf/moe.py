"""The tables of families with experts: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3.

Sources as in `hf_decoders`. Published files have a tensor for each expert, which is what is read
and written; transformers joins them when it loads.
"""

import dataclasses
import math

from llmjax.core.errors import UserError, note
from llmjax.formats.hf.decoders import (
  BIAS,
  COMMON_KEYS,
  DIVIDES,
  LLAMA,
  QWEN3,
  A,
  B,
  L,
  sizes,
  without,
)
from llmjax.formats.hf.family import Key, Part, only
from llmjax.formats.hf.layers import window
from llmjax.formats.hf.rope import TYPES, rope

# Of training, or of how experts are spread, alone.
_UNREAD = "output_router_logits router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux"
UNREAD = Part((*_UNREAD.split(), "ep_size"))
EXPERTS = {
  L + "mlp.gate": B + "moe/router",
  L + "mlp.experts.{e}.{gate,up,down}_proj": B + "moe/{gate,up,down}",
}
ROUTING = {
  "num_experts_per_tok": Key("moe.top_k", 8),
  "norm_topk_prob": Key("moe.renormalize", False),
}


def _first_layers(layers: list, values) -> int:
  if sorted(layers) != list(range(len(layers))):
    raise UserError(f"mlp_only_layers={layers!r} is not supported: dense layers come first")
  return len(layers)


MIXTRAL = dataclasses.replace(
  LLAMA, name="mixtral", architecture="MixtralForCausalLM",
  keys=COMMON_KEYS
  | sizes(4096, 32, 32, 14_336, 32_000, 131_072)
  | {
    "num_key_value_heads": Key("kv_heads", 8, null=0),
    "rms_norm_eps": Key("norm.eps", 1e-5),
    "num_local_experts": Key("moe.experts", 8, other="num_experts"),
    "num_experts_per_tok": Key("moe.top_k", 2),
  },
  parts=(rope(theta=1_000_000.0), window(None), UNREAD),
  tensors=without(LLAMA.tensors, "mlp.")
  | {
    L + "block_sparse_moe.gate": B + "moe/router",
    L + "block_sparse_moe.experts.{e}.{w1,w3,w2}": B + "moe/{gate,up,down}",
  },
)
QWEN3_MOE = dataclasses.replace(
  QWEN3, name="qwen3_moe", architecture="Qwen3MoeForCausalLM",
  keys=QWEN3.keys
  | ROUTING
  | sizes(2048, 24, 32, 6144, 151_936, 32_768)
  | {
    "num_key_value_heads": Key("kv_heads", 4, null=0),
    "head_dim": Key("head_dim", 0, null=0),
    "moe_intermediate_size": Key("moe.width", 768),
    "decoder_sparse_step": only(1),
    "use_sliding_window": only(False),
    "num_experts": Key("moe.experts", 128, other="num_local_experts"),  # the latter since version 5
    "mlp_only_layers": Key(
      "moe.first_k_dense", (), (_first_layers, lambda number, _: list(range(number))), null=()
    ),
  },
  parts=(rope(), UNREAD, Part(("sliding_window", "max_window_layers"))),
  tensors=QWEN3.tensors | EXPERTS,
)
OLMOE = dataclasses.replace(
  LLAMA, name="olmoe", architecture="OlmoeForCausalLM",
  keys=without(COMMON_KEYS, "head_dim")
  | BIAS
  | ROUTING
  | sizes(2048, 16, 16, 2048, 50_304, 4096)
  | {
    "num_experts": Key("moe.experts", 64, other="num_local_experts"),
    "rms_norm_eps": Key("norm.eps", 1e-5),
    "clip_qkv": only(None),
  },
  fixed={"attention.qk_norm": "all"},
  parts=(rope(), DIVIDES, UNREAD),
  tensors=without(LLAMA.tensors, "mlp.") | EXPERTS,
)


def _read_latent(theirs, values):
  if any(theirs.get(key) for key in FURTHER):
    note("a layer behind the last one, to predict further tokens, is left out if there is one")
  scaling = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
  share, factor = scaling.get("mscale_all_dim"), values.get("position.factor", 1)
  h = sum(values[f"attention.latent.{part}_dim"] for part in ("nope", "rope"))
  if not share or factor <= 1 or not h:  # without a width the config is refused later
    return {}
  return {"attention.scale": h**-0.5 * (0.1 * share * math.log(factor) + 1) ** 2}


def _write_latent(config):
  made = {FURTHER[0]: 0}
  position, scale = config.position, config.attention.scale
  if not scale or position.factor <= 1:
    return made
  growth = math.sqrt(scale * config.dims["h"] ** 0.5) - 1
  share = {"mscale_all_dim": round(growth / (0.1 * math.log(position.factor)), 9)}
  scaling = ROPE.write(config)["rope_scaling"] | share
  if scaling.get("attention_factor") == 1:  # in their words: both mscales are alike
    scaling |= {"mscale": scaling["mscale_all_dim"]}
    scaling.pop("attention_factor")
  return made | {"rope_scaling": scaling}


def _read_groups(theirs, values):
  if theirs.get("topk_method") != LIMITED:
    return {}
  return {"moe.groups": theirs.get("n_group"), "moe.top_groups": theirs.get("topk_group")}


def _write_groups(config):
  groups = {"n_group": config.moe.groups, "topk_group": config.moe.top_groups}
  return groups | ({"topk_method": LIMITED} if config.moe.groups > 1 else {})


LIMITED = "group_limited_greedy"
ROPE = rope(
  kinds={kind: kind for kind in TYPES if kind != "dynamic"}, elsewhere=("mscale_all_dim",)
)
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
LATENT = Part(("head_dim", "qk_head_dim", *FURTHER), _read_latent, _write_latent)
DEEPSEEK_V3 = dataclasses.replace(
  LLAMA, name="deepseek_v3", architecture="DeepseekV3ForCausalLM",
  keys=without(COMMON_KEYS, "head_dim")
  | sizes(7168, 61, 128, 18_432, 129_280, 4096)
  | {
    "num_key_value_heads": Key("kv_heads", 128, null=0),
    "attention_bias": only(False),
    "q_lora_rank": Key("attention.latent.query_rank", 1536, null=0),
    "kv_lora_rank": Key("attention.latent.kv_rank", 512),
    "qk_rope_head_dim": Key("attention.latent.rope_dim", 64),
    "qk_nope_head_dim": Key("attention.latent.nope_dim", 128),
    "v_head_dim": Key("attention.latent.value_dim", 128),
    "rope_interleave": Key("position.layout", True, {True: "interleaved", False: "half"}),
    "n_routed_experts": Key("moe.experts", 256, other="num_local_experts"),
    "n_shared_experts": Key("moe.shared", 1),
    "num_experts_per_tok": Key("moe.top_k", 8),
    "moe_intermediate_size": Key("moe.width", 2048),
    "first_k_dense_replace": Key("moe.first_k_dense", 3),
    "norm_topk_prob": Key("moe.renormalize", True),
    "routed_scaling_factor": Key("moe.scale", 2.5),
    "n_group": Key("moe.groups", 8),
    "topk_group": Key("moe.top_groups", 4),
    "topk_method": only("noaux_tc"),
    "scoring_func": only("sigmoid"),
    "moe_layer_freq": only(1),
  },
  fixed={"moe.router": "sigmoid", "moe.bias": True},
  parts=(ROPE, LATENT, UNREAD),
  tensors=without(LLAMA.tensors, "{q,k,v}", "{q,k}")
  | EXPERTS
  | {
    L + "mlp.gate.e_score_correction_bias": ("e", B + "moe/bias_e"),
    L + "mlp.shared_experts.{gate,up,down}_proj": B + "moe/shared/{gate,up,down}",
    L + "self_attn.q_proj": A + "query",
    L + "self_attn.q_{a,b}_proj": A + "query_{down,up}",
    L + "self_attn.q_a_layernorm": A + "query_norm",
    L + "self_attn.kv_a_proj_with_mqa.weight": ("(r+h)d", (A + "latent_dr", A + "key_rope_dh")),
    L + "self_attn.kv_a_layernorm": A + "latent_norm",
    L + "self_attn.kv_b_proj.weight": ("(n*h)r", (A + "key_up_rnh", A + "value_up_rnh")),
  },
  skip=lambda name, config: name.startswith(f"model.layers.{config.layers}."),
)
DEEPSEEK_V2 = dataclasses.replace(
  DEEPSEEK_V3, name="deepseek_v2", architecture="DeepseekV2ForCausalLM",
  keys=without(DEEPSEEK_V3.keys, "group", "topk_method", "rope_interleave", "norm_topk")
  | sizes(4096, 32, 32, 11_008, 102_400, 2048)
  | {
    "num_key_value_heads": Key("kv_heads", 0, null=0),
    "n_routed_experts": Key("moe.experts", 64, other="num_experts"),
    "n_shared_experts": Key("moe.shared", 2),
    "num_experts_per_tok": Key("moe.top_k"),
    "moe_intermediate_size": Key("moe.width", 1407),
    "first_k_dense_replace": Key("moe.first_k_dense", 0),
    "routed_scaling_factor": Key("moe.scale", 1.0),
    "topk_method": only("greedy", LIMITED),
    "norm_topk_prob": only(False),
    "scoring_func": only("softmax"),
    "mlp_bias": only(False),
  },
  fixed={"moe.renormalize": False, "position.layout": "interleaved"},
  skip=LLAMA.skip,
  parts=(
    ROPE, LATENT, UNREAD, DIVIDES,
    Part(("n_group", "topk_group"), _read_groups, _write_groups),
  ),
)
MOES = (MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V3, DEEPSEEK_V2)
