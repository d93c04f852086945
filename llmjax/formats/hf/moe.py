"""The tables of families with experts: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3.
Sources as in `hf.decoders`. Read and written are published files, which have a tensor for each
expert; transformers joins them when it loads."""

import math
from dataclasses import replace

from llmjax.core.errors import UserError, note
from llmjax.formats.hf.decoders import BIAS, DIVIDES, LLAMA, QWEN3, A, B, L, llama_keys, without
from llmjax.formats.hf.family import Codec, Key, only
from llmjax.formats.hf.layers import window
from llmjax.formats.hf.rope import TYPES, rope

# Of training, or of how experts are spread over devices, alone.
_UNREAD = (
  "output_router_logits router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux ep_size"
)
UNREAD = Codec(tuple(_UNREAD.split()))
EXPERTS = {
  L + "mlp.gate": B + "moe/router",
  L + "mlp.experts.{e}.{gate,up,down}_proj": B + "moe/{gate,up,down}",
}


def _moe_keys(experts, top_k, width=None, renormalize=None, other="num_local_experts") -> dict:
  """Keys of routing with their defaults; `num_local_experts` stands for `num_experts` since 5."""
  keys = {
    "num_experts": Key("moe.experts", experts, other=other),
    "num_experts_per_tok": Key("moe.top_k", top_k),
    "moe_intermediate_size": Key("moe.width", width),
    "norm_topk_prob": Key("moe.renormalize", renormalize),
  }
  return {name: key for name, key in keys.items() if key.default is not None}


def _first_layers(layers: list, fields) -> int:
  if sorted(layers) != list(range(len(layers))):
    raise UserError(f"mlp_only_layers={layers!r} is not supported: dense layers come first")
  return len(layers)


MIXTRAL = replace(
  LLAMA, name="mixtral", architecture="MixtralForCausalLM",
  keys=llama_keys(4096, 32, 32, 14_336, 32_000, 131_072, kv_heads=8, eps=1e-5)
  | {
    "num_local_experts": Key("moe.experts", 8, other="num_experts"),
    "num_experts_per_tok": Key("moe.top_k", 2),
  },
  codecs=(rope(theta=1_000_000.0), window(None), UNREAD),
  tensors=without(LLAMA.tensors, "mlp.")
  | {
    L + "block_sparse_moe.gate": B + "moe/router",
    L + "block_sparse_moe.experts.{e}.{w1,w3,w2}": B + "moe/{gate,up,down}",
  },
)
QWEN3_MOE = replace(
  QWEN3, name="qwen3_moe", architecture="Qwen3MoeForCausalLM",
  keys=llama_keys(2048, 24, 32, 6144, 151_936, 32_768, kv_heads=4)
  | BIAS
  | _moe_keys(128, 8, 768, False)
  | {
    "decoder_sparse_step": only(1),
    "use_sliding_window": only(False),
    "mlp_only_layers": Key(
      "moe.first_k_dense", (), (_first_layers, lambda number, _: list(range(number))), null=()
    ),
  },
  codecs=(rope(), UNREAD, Codec(("sliding_window", "max_window_layers"))),
  tensors=QWEN3.tensors | EXPERTS,
)
OLMOE = replace(
  LLAMA, name="olmoe", architecture="OlmoeForCausalLM",
  keys=without(llama_keys(2048, 16, 16, 2048, 50_304, 4096, eps=1e-5), "head_dim")
  | BIAS
  | _moe_keys(64, 8, renormalize=False)
  | {"clip_qkv": only(None)},
  fixed={"attention.qk_norm": "all"},
  codecs=(rope(), DIVIDES, UNREAD),
  tensors=without(LLAMA.tensors, "mlp.") | EXPERTS,
)


def _read_latent(raw, fields):
  if any(raw.get(key) for key in FURTHER):
    note("a layer behind the last one, to predict further tokens, is left out if there is one")
  scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  mscale, factor = scaling.get("mscale_all_dim"), fields.get("position.factor", 1)
  h = sum(fields[f"attention.latent.{name}_dim"] for name in ("nope", "rope"))
  if not mscale or factor <= 1 or not h:  # without a width the config is refused later
    return {}
  return {"attention.scale": h**-0.5 * (0.1 * mscale * math.log(factor) + 1) ** 2}


def _write_latent(config):
  keys = {FURTHER[0]: 0}
  position, scale = config.position, config.attention.scale
  if not scale or position.factor <= 1:
    return keys
  growth = math.sqrt(scale * config.dims["h"] ** 0.5) - 1
  mscale = round(growth / (0.1 * math.log(position.factor)), 9)
  scaling = ROPE.write(config)["rope_scaling"] | {"mscale_all_dim": mscale}
  if scaling.get("attention_factor") == 1:  # DeepSeek says it by two equal mscales
    scaling["mscale"] = mscale
    del scaling["attention_factor"]
  return keys | {"rope_scaling": scaling}


LIMITED = "group_limited_greedy"
GROUPS = {"n_group": "groups", "topk_group": "top_groups"}
LIMITS = Codec(
  tuple(GROUPS),
  lambda raw, fields: {f"moe.{field}": raw.get(key) for key, field in GROUPS.items()}
  if raw.get("topk_method") == LIMITED else {},
  lambda config: {key: getattr(config.moe, field) for key, field in GROUPS.items()}
  | ({"topk_method": LIMITED} if config.moe.groups > 1 else {}),
)
ROPE = rope(
  kinds={kind: kind for kind in TYPES if kind != "dynamic"}, elsewhere=("mscale_all_dim",)
)
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
LATENT = Codec(("head_dim", "qk_head_dim", *FURTHER), _read_latent, _write_latent)


def _deepseek_keys(*numbers, kv_heads, experts, shared, top_k, width, dense, scale) -> dict:
  return without(llama_keys(*numbers, kv_heads=kv_heads), "head_dim") | {
    "attention_bias": only(False),
    "q_lora_rank": Key("attention.latent.query_rank", 1536, null=0),
    "kv_lora_rank": Key("attention.latent.kv_rank", 512),
    "qk_rope_head_dim": Key("attention.latent.rope_dim", 64),
    "qk_nope_head_dim": Key("attention.latent.nope_dim", 128),
    "v_head_dim": Key("attention.latent.value_dim", 128),
    "n_routed_experts": experts,
    "n_shared_experts": Key("moe.shared", shared),
    "num_experts_per_tok": top_k,
    "moe_intermediate_size": Key("moe.width", width),
    "first_k_dense_replace": Key("moe.first_k_dense", dense),
    "routed_scaling_factor": Key("moe.scale", scale),
    "moe_layer_freq": only(1),
  }


DEEPSEEK_V3 = replace(
  LLAMA, name="deepseek_v3", architecture="DeepseekV3ForCausalLM",
  keys=_deepseek_keys(
    7168, 61, 128, 18_432, 129_280, 4096, kv_heads=128, shared=1, width=2048, dense=3, scale=2.5,
    experts=Key("moe.experts", 256, other="num_local_experts"), top_k=Key("moe.top_k", 8),
  )
  | {
    "rope_interleave": Key("position.layout", True, {True: "interleaved", False: "half"}),
    "norm_topk_prob": Key("moe.renormalize", True),
    "n_group": Key("moe.groups", 8),
    "topk_group": Key("moe.top_groups", 4),
    "topk_method": only("noaux_tc"),
    "scoring_func": only("sigmoid"),
  },
  fixed={"moe.router": "sigmoid", "moe.bias": True},
  codecs=(ROPE, LATENT, UNREAD),
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
DEEPSEEK_V2 = replace(
  DEEPSEEK_V3, name="deepseek_v2", architecture="DeepseekV2ForCausalLM",
  keys=_deepseek_keys(
    4096, 32, 32, 11_008, 102_400, 2048, kv_heads=0, shared=2, width=1407, dense=0, scale=1.0,
    experts=Key("moe.experts", 64, other="num_experts"), top_k=Key("moe.top_k"),
  )
  | {
    "topk_method": only("greedy", LIMITED),
    "norm_topk_prob": only(False),
    "scoring_func": only("softmax"),
    "mlp_bias": only(False),
  },
  fixed={"moe.renormalize": False, "position.layout": "interleaved"},
  skip=LLAMA.skip,
  codecs=(ROPE, LATENT, UNREAD, DIVIDES, LIMITS),
)
MOES = (MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V3, DEEPSEEK_V2)
