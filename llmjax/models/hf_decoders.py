"""The tables of decoder families: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, OLMo, Phi, Gemma.

Sources: the `config.json` files and weights that their authors published, and the meaning that
transformers gives to them. Each table is the one before it with what differs.
"""

from llmjax.core.errors import UserError
from llmjax.models.hf_family import Family, Key, Part, only
from llmjax.models.hf_rope import GEMMA3_ROPE, QWEN_LAYERS, gemma_layers, rope, window

PLAIN = {
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu": "gelu",
  "relu": "relu",
  "relu2": "relu2",
  "quick_gelu": "quick_gelu",
  "silu": "silu",
  "swish": "silu",
}
GATED = {
  "silu": "swiglu",
  "swish": "swiglu",
  "gelu": "geglu",
  "gelu_pytorch_tanh": "geglu_tanh",
  "gelu_new": "geglu_tanh",
  "relu": "reglu",
}
BIASES = {False: "none", True: "all"}
B = "decoder/blocks/"
A = B + "attention/"
M = B + "mlp/"
L = "model.layers.{l}."


def norm(theirs: str, ours: str) -> dict:
  """Rows of a norm's scale and bias."""
  return {f"{theirs}.weight": ("d", f"{ours}/scale_d"), f"{theirs}.bias": ("d", f"{ours}/bias_d")}


def linear(theirs: str, ours, made, read: str, first: str = "made") -> dict:
  """Rows of a projection's weight and bias.

  Args:
    theirs: the module's name.
    ours: our path without letters, or several where one tensor holds several projections.
    made: letters of what it makes, or as many.
    read: letters of what it reads.
    first: their first dimension: what is `made` (torch's Linear), or what is `read` (Conv1D).
  """
  ours, made = ((ours,), (made,)) if isinstance(ours, str) else (ours, made)
  outer = "+".join(made) if len(made[0]) == 1 == len(made) else f"({'+'.join(made)})"
  inner = read if len(read) == 1 else f"({read})"
  pairs = list(zip(ours, made, strict=True))
  weights = tuple(f"{path}_{read}{letters}" for path, letters in pairs)
  biases = tuple(f"{path}_bias_{letters}" for path, letters in pairs)
  letters = outer + inner if first == "made" else inner + outer
  return {f"{theirs}.weight": (letters, weights), f"{theirs}.bias": (outer, biases)}


def _divides(config):
  if config.width % config.heads:
    raise UserError(f"transformers wants heads {config.heads} to divide width {config.width}")
  return {}


DIVIDES = Part((), write=_divides)

LLAMA_TENSORS = {
  "model.embed_tokens.weight": ("vd", "embed/token_vd"),
  **norm(L + "input_layernorm", B + "attention_norm"),
  **linear(L + "self_attn.q_proj", A + "query", "nh", "d"),
  **linear(L + "self_attn.k_proj", A + "key", "kh", "d"),
  **linear(L + "self_attn.v_proj", A + "value", "kh", "d"),
  **linear(L + "self_attn.o_proj", A + "out", "d", "nh"),
  **norm(L + "post_attention_layernorm", B + "mlp_norm"),
  **linear(L + "mlp.gate_proj", M + "gate", "f", "d"),
  **linear(L + "mlp.up_proj", M + "up", "f", "d"),
  **linear(L + "mlp.down_proj", M + "down", "d", "f"),
  **norm("model.norm", "decoder/norm"),
  "lm_head.weight": ("vd", "embed/head_dv"),
}
LLAMA_KEYS = {
  "vocab_size": Key("vocab_size"),
  "hidden_size": Key("width"),
  "num_hidden_layers": Key("layers"),
  "num_attention_heads": Key("heads"),
  "num_key_value_heads": Key("kv_heads", 0, null=0),
  "head_dim": Key("head_dim", 0),
  "intermediate_size": Key("mlp_width"),
  "max_position_embeddings": Key("context"),
  "rms_norm_eps": Key("norm.eps", 1e-6),
  "hidden_act": Key("activation", "silu", GATED),
  "tie_word_embeddings": Key("tie_embeddings", False),
}
LLAMA_COMMON = {
  "tensors": LLAMA_TENSORS,
  "aliases": ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
  "ignore": (r"rotary_emb\.inv_freq$",),
  "twins": {"lm_head.weight": "model.embed_tokens.weight"},
}
BIAS = {"attention_bias": Key("attention.bias", False, BIASES)}
LLAMA = Family(
  "llama",
  "LlamaForCausalLM",
  LLAMA_KEYS | BIAS | {"mlp_bias": Key("mlp_bias", False)},
  {},
  (rope(), DIVIDES),
  **LLAMA_COMMON,
)
MISTRAL = Family(
  "mistral",
  "MistralForCausalLM",
  LLAMA_KEYS | {"num_key_value_heads": Key("kv_heads", 8, null=0)},
  {},
  (rope(), window(4096)),
  **LLAMA_COMMON,
)
QWEN2 = Family(
  "qwen2",
  "Qwen2ForCausalLM",
  LLAMA_KEYS | {"num_key_value_heads": Key("kv_heads", 32, null=0)},
  {"attention.bias": "qkv"},
  (rope(), QWEN_LAYERS),
  **LLAMA_COMMON,
)
HEAD_NORMS = {
  L + "self_attn.q_norm.weight": ("h", A + "query_norm/scale_h"),
  L + "self_attn.k_norm.weight": ("h", A + "key_norm/scale_h"),
}
QWEN3 = Family(
  "qwen3",
  "Qwen3ForCausalLM",
  QWEN2.keys | BIAS | {"head_dim": Key("head_dim", 128)},
  {"attention.qk_norm": "head"},
  (rope(), QWEN_LAYERS),
  **LLAMA_COMMON | {"tensors": LLAMA_TENSORS | HEAD_NORMS},
)


def _without(table: dict, *parts: str) -> dict:
  return {name: row for name, row in table.items() if not any(part in name for part in parts)}


OLMO2 = Family(
  "olmo2",
  "Olmo2ForCausalLM",
  LLAMA_KEYS | BIAS | {"rms_norm_eps": Key("norm.eps", 1e-5)},
  {"norm.place": "output", "attention.qk_norm": "all"},
  (rope(),),
  **LLAMA_COMMON
  | {
    "tensors": _without(LLAMA_TENSORS, "layernorm")
    | {
      **norm(L + "post_attention_layernorm", B + "attention_norm"),
      **norm(L + "post_feedforward_layernorm", B + "mlp_norm"),
      L + "self_attn.q_norm.weight": ("(nh)", A + "query_norm/scale_nh"),
      L + "self_attn.k_norm.weight": ("(kh)", A + "key_norm/scale_kh"),
    }
  },
)
PHI3 = Family(
  "phi3",
  "Phi3ForCausalLM",
  LLAMA_KEYS | {"rms_norm_eps": Key("norm.eps", 1e-5)},
  {},
  (rope(fraction_key="partial_rotary_factor", scalings=("default",)), window(None)),
  **LLAMA_COMMON
  | {
    "tensors": _without(LLAMA_TENSORS, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    | {
      **linear(
        L + "self_attn.qkv_proj", (A + "query", A + "key", A + "value"), ("nh", "kh", "kh"), "d"
      ),
      **linear(L + "mlp.gate_up_proj", (M + "gate", M + "up"), ("f", "f"), "d"),
    }
  },
)


def _read_gemma(theirs, values):
  scale = (theirs.get("query_pre_attn_scalar") or 256) ** -0.5
  return {"embed.scale": values["width"] ** 0.5, "attention.scale": scale}


def _write_gemma(config):
  scale = config.attention.scale or config.dims["h"] ** -0.5
  return {"query_pre_attn_scalar": round(scale**-2)}


GEMMA_SCALES = Part(("query_pre_attn_scalar", "hidden_act"), _read_gemma, _write_gemma)
GEMMA_COMMON = LLAMA_COMMON | {"offset": 1.0}
GEMMA_TENSORS = _without(LLAMA_TENSORS, "post_attention") | {
  **norm(L + "post_attention_layernorm", B + "attention_out_norm"),
  **norm(L + "pre_feedforward_layernorm", B + "mlp_norm"),
  **norm(L + "post_feedforward_layernorm", B + "mlp_out_norm"),
}
GEMMA2_KEYS = _without(LLAMA_KEYS, "hidden_act") | {
  "num_attention_heads": Key("heads", 8),
  "num_key_value_heads": Key("kv_heads", 4),
  "head_dim": Key("head_dim", 256),
  "max_position_embeddings": Key("context", 8192),
  "hidden_activation": Key("activation", "gelu_pytorch_tanh", GATED),
  "tie_word_embeddings": Key("tie_embeddings", True),
  "attention_bias": Key("attention.bias", False, BIASES),
  "use_bidirectional_attention": only(None, False),
}
GEMMA2 = Family(
  "gemma2",
  "Gemma2ForCausalLM",
  GEMMA2_KEYS
  | {
    "attn_logit_softcapping": Key("attention.softcap", 50.0, null=0.0),
    "final_logit_softcapping": Key("embed.logit_softcap", 30.0, null=0.0),
  },
  {"norm.place": "sandwich"},
  (rope(), gemma_layers(2), GEMMA_SCALES, DIVIDES),
  **GEMMA_COMMON | {"tensors": GEMMA_TENSORS},
)
GEMMA3 = Family(
  "gemma3_text",
  "Gemma3ForCausalLM",
  GEMMA2_KEYS
  | {
    "vocab_size": Key("vocab_size", 262_208),
    "max_position_embeddings": Key("context", 131_072),
    "attn_logit_softcapping": only(None),
    "final_logit_softcapping": Key("embed.logit_softcap", 0.0, null=0.0),
  },
  {"norm.place": "sandwich", "attention.qk_norm": "head"},
  (GEMMA3_ROPE, gemma_layers(6), GEMMA_SCALES, DIVIDES),
  **GEMMA_COMMON | {"tensors": GEMMA_TENSORS | HEAD_NORMS},
)
LAYER_NORM = {"norm.kind": "layer", "norm.bias": True, "mlp_bias": True}


def _read_gpt2(theirs, values):
  return {"mlp_width": theirs.get("n_inner") or 4 * values["width"]}


G = "transformer.h.{l}."
GPT2 = Family(
  "gpt2",
  "GPT2LMHeadModel",
  {
    "vocab_size": Key("vocab_size"),
    "n_embd": Key("width"),
    "n_layer": Key("layers"),
    "n_head": Key("heads"),
    "n_positions": Key("context", 1024),
    "activation_function": Key("activation", "gelu_new", PLAIN),
    "layer_norm_epsilon": Key("norm.eps", 1e-5),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
    "reorder_and_upcast_attn": only(False, True),
  },
  LAYER_NORM | {"attention.bias": "all", "position.kind": "learned"},
  (Part(("n_inner",), _read_gpt2, lambda config: {"n_inner": config.mlp_width}),),
  {
    "transformer.wte.weight": ("vd", "embed/token_vd"),
    "transformer.wpe.weight": ("td", "embed/position_td"),
    **norm(G + "ln_1", B + "attention_norm"),
    **linear(
      G + "attn.c_attn", (A + "query", A + "key", A + "value"), ("nh", "kh", "kh"), "d", "read"
    ),
    **linear(G + "attn.c_proj", A + "out", "d", "nh", "read"),
    **norm(G + "ln_2", B + "mlp_norm"),
    **linear(G + "mlp.c_fc", M + "up", "f", "d", "read"),
    **linear(G + "mlp.c_proj", M + "down", "d", "f", "read"),
    **norm("transformer.ln_f", "decoder/norm"),
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  aliases=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
  ignore=(r"\.attn\.(bias|masked_bias)$",),
  twins={"lm_head.weight": "transformer.wte.weight"},
)
X = "gpt_neox.layers.{l}."
NEOX = Family(
  "gpt_neox",
  "GPTNeoXForCausalLM",
  _without(LLAMA_KEYS, "num_key_value_heads", "head_dim", "rms_norm_eps")
  | {
    "hidden_act": Key("activation", "gelu", PLAIN),
    "layer_norm_eps": Key("norm.eps", 1e-5),
    "use_parallel_residual": Key("block", True, {True: "parallel", False: "sequential"}),
    "attention_bias": Key("attention.bias", True, BIASES),
    "is_decoder": only(False, True),
  },
  LAYER_NORM,
  (rope("rotary_emb_base", "rotary_pct", 0.25), DIVIDES),
  {
    "gpt_neox.embed_in.weight": ("vd", "embed/token_vd"),
    **norm(X + "input_layernorm", B + "attention_norm"),
    X + "attention.query_key_value.weight": (
      "(n*h)d",
      (A + "query_dnh", A + "key_dkh", A + "value_dkh"),
    ),
    X + "attention.query_key_value.bias": (
      "(n*h)",
      (A + "query_bias_nh", A + "key_bias_kh", A + "value_bias_kh"),
    ),
    **linear(X + "attention.dense", A + "out", "d", "nh"),
    **norm(X + "post_attention_layernorm", B + "mlp_norm"),
    **linear(X + "mlp.dense_h_to_4h", M + "up", "f", "d"),
    **linear(X + "mlp.dense_4h_to_h", M + "down", "d", "f"),
    **norm("gpt_neox.final_layer_norm", "decoder/norm"),
    "embed_out.weight": ("vd", "embed/head_dv"),
  },
  aliases=(
    (r"^(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1."),
    (r"^lm_head\.weight$", "embed_out.weight"),
  ),
  ignore=(r"rotary_emb\.inv_freq$", r"attention\.(bias|masked_bias)$"),
  twins={"embed_out.weight": "gpt_neox.embed_in.weight"},
)
DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GEMMA3, GPT2, NEOX, PHI3)
