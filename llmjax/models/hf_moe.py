"""The tables of families with experts: Mixtral, Qwen3-MoE, OLMoE.

Sources as in `hf_decoders`. Published files have a tensor for each expert, which is what is read
and written; transformers joins them when it loads.
"""

import dataclasses

from llmjax.core.errors import UserError
from llmjax.models.hf_decoders import BIAS, COMMON_KEYS, DIVIDES, LLAMA, QWEN3, B, L, without
from llmjax.models.hf_family import Key, Part, only
from llmjax.models.hf_rope import rope, window

# Of training alone.
UNREAD = Part(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))
EXPERTS = {
  L + "mlp.gate": B + "moe/router",
  L + "mlp.experts.{e}.{gate,up,down}_proj": B + "moe/{gate,up,down}",
}
ROUTING = {
  "num_experts_per_tok": Key("moe.top_k"),
  "norm_topk_prob": Key("moe.renormalize", False),
}


def _read_experts(theirs, values):
  number = theirs.get("num_experts", theirs.get("num_local_experts"))  # the latter since version 5
  if not number:
    raise UserError("config.json of this qwen3_moe model has no 'num_experts'")
  return {"moe.experts": number}


def _read_dense(theirs, values):
  layers = theirs.get("mlp_only_layers") or []
  if sorted(layers) != list(range(len(layers))):
    raise UserError(f"mlp_only_layers={layers!r} is not supported: dense layers come first")
  return {"moe.dense_first": len(layers)}


def _write_dense(config):
  return {"mlp_only_layers": list(range(config.moe.dense_first))}


MIXTRAL = dataclasses.replace(
  LLAMA, name="mixtral", architecture="MixtralForCausalLM",
  keys=COMMON_KEYS
  | {
    "num_key_value_heads": Key("kv_heads", 8, null=0),
    "rms_norm_eps": Key("norm.eps", 1e-5),
    "num_local_experts": Key("moe.experts", 8),
    "num_experts_per_tok": Key("moe.top_k", 2),
  },
  parts=(rope(), window(None), UNREAD),
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
  | {
    "num_key_value_heads": Key("kv_heads", 4, null=0),
    "head_dim": Key("head_dim", 0),
    "moe_intermediate_size": Key("moe.width", 768),
    "decoder_sparse_step": only(1),
    "use_sliding_window": only(False),
  },
  parts=(
    rope(), UNREAD, Part(("sliding_window", "max_window_layers")),
    Part(
      ("num_experts", "num_local_experts"), _read_experts,
      lambda config: {"num_experts": config.moe.experts},
    ),
    Part(("mlp_only_layers",), _read_dense, _write_dense),
  ),
  tensors=QWEN3.tensors | EXPERTS,
)
OLMOE = dataclasses.replace(
  LLAMA, name="olmoe", architecture="OlmoeForCausalLM",
  keys=without(COMMON_KEYS, "head_dim")
  | BIAS
  | ROUTING
  | {
    "num_experts": Key("moe.experts", 64),
    "rms_norm_eps": Key("norm.eps", 1e-5),
    "clip_qkv": only(None),
  },
  fixed={"attention.qk_norm": "all"},
  parts=(rope(), DIVIDES, UNREAD),
  tensors=without(LLAMA.tensors, "mlp.") | EXPERTS,
)
MOES = (MIXTRAL, QWEN3_MOE, OLMOE)
