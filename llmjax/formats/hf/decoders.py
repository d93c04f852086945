"""The tables of decoder families: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, OLMo, Phi, Gemma.
Sources: the `config.json` files and weights that their authors published, as transformers reads
them. Each table is another one with what differs."""

from dataclasses import replace

from llmjax.core.errors import UserError
from llmjax.formats.hf.family import REQUIRED, Codec, Family, Key, only
from llmjax.formats.hf.layers import QWEN_LAYERS, gemma_layers, window
from llmjax.formats.hf.rope import rope

PLAIN = {
  "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
  "gelu": "gelu", "relu": "relu", "relu2": "relu2", "quick_gelu": "quick_gelu",
  "silu": "silu", "swish": "silu",
}
GATED = {
  "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh",
  "gelu_new": "geglu_tanh", "relu": "reglu",
}
BIAS = {"attention_bias": Key("attention.bias", False, {False: "none", True: "all"})}
B = "decoder/blocks/"
A = B + "attention/"
L = "model.layers.{l}."


def sizes(width, layers, heads, mlp_width, vocab_size=0, max_seq_len=0) -> dict:
  """The keys of a model's sizes with their defaults, without those that are 0."""
  keys = {
    "hidden_size": Key("width", width),
    "num_hidden_layers": Key("layers", layers),
    "num_attention_heads": Key("heads", heads),
    "intermediate_size": Key("mlp_width", mlp_width),
    "vocab_size": Key("vocab_size", vocab_size),
    "max_position_embeddings": Key("max_seq_len", max_seq_len),
  }
  return {name: key for name, key in keys.items() if key.default}


def llama_keys(*numbers, kv_heads=0, head_dim=0, eps=1e-6) -> dict:
  """The keys that Llama and its successors share, with these `sizes`."""
  return sizes(*numbers) | {
    "num_key_value_heads": Key("kv_heads", kv_heads, null=0),
    "head_dim": Key("head_dim", head_dim, null=REQUIRED if head_dim else 0),
    "rms_norm_eps": Key("norm.eps", eps),
    "hidden_act": Key("activation", "silu", GATED),
    "tie_word_embeddings": Key("tie_embeddings", False),
  }


def without(table: dict, *substrings: str) -> dict:
  """Leaves out the rows whose names have one of these substrings."""
  return {name: row for name, row in table.items() if not any(each in name for each in substrings)}


def _divides(config):
  if config.width % config.heads:
    raise UserError(f"transformers wants heads {config.heads} to divide width {config.width}")
  return {}


DIVIDES = Codec((), write=_divides)
LLAMA = Family(
  "llama", "LlamaForCausalLM",
  llama_keys(4096, 32, 32, 11_008, 32_000, 2048) | {"mlp_bias": Key("mlp_bias", False)} | BIAS,
  {
    "model.embed_tokens.weight": ("vd", "embed/token_vd"),
    L + "input_layernorm": B + "attention_norm",
    L + "self_attn.{q,k,v}_proj": A + "{query,key,value}",
    L + "self_attn.{q,k}_norm": A + "{query,key}_norm",
    L + "self_attn.o_proj": A + "out",
    L + "post_attention_layernorm": B + "mlp_norm",
    L + "mlp.{gate,up}_proj": B + "mlp/{gate,up}",
    L + "mlp.down_proj": B + "mlp/down",
    "model.norm": "decoder/norm",
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  (rope(), DIVIDES),
  aliases=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
  ignore=(r"rotary_emb\.inv_freq$",),
)
MISTRAL = replace(
  LLAMA, name="mistral", architecture="MistralForCausalLM",
  keys=llama_keys(4096, 32, 32, 14_336, 32_000, 131_072, kv_heads=8),
  codecs=(rope(), window(4096)),
)
QWEN2 = replace(
  LLAMA, name="qwen2", architecture="Qwen2ForCausalLM",
  keys=llama_keys(4096, 32, 32, 22_016, 151_936, 32_768, kv_heads=32),
  fixed={"attention.bias": "qkv"},
  codecs=(rope(), QWEN_LAYERS),
)
QWEN3 = replace(
  QWEN2, name="qwen3", architecture="Qwen3ForCausalLM",
  keys=llama_keys(4096, 32, 32, 22_016, 151_936, 32_768, kv_heads=32, head_dim=128) | BIAS,
  fixed={"attention.qk_norm": "head"},
)
OLMO2 = replace(
  LLAMA, name="olmo2", architecture="Olmo2ForCausalLM",
  keys=llama_keys(4096, 32, 32, 11_008, 50_304, 2048, eps=1e-5) | BIAS,
  fixed={"norm.place": "output", "attention.qk_norm": "all"},
  codecs=(rope(),),
  tensors=without(LLAMA.tensors, "layernorm")
  | {
    L + "post_attention_layernorm": B + "attention_norm",
    L + "post_feedforward_layernorm": B + "mlp_norm",
  },
)
PHI3_ROPE = rope(
  fraction_key="partial_rotary_factor", original=4096,
  kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
)
PHI3 = replace(
  LLAMA, name="phi3", architecture="Phi3ForCausalLM",
  keys=llama_keys(3072, 32, 32, 8192, 32_064, 4096, eps=1e-5),
  codecs=(PHI3_ROPE, window(None)),
  tensors=without(LLAMA.tensors, "{q,k,v}", "{gate,up}")
  | {
    L + "self_attn.qkv_proj": A + "{query,key,value}",
    L + "mlp.gate_up_proj": B + "mlp/{gate,up}",
  },
)


GEMMA_SCALE = (
  lambda scalar, _: scalar**-0.5,
  lambda scale, config: round((scale or config.dims["h"] ** -0.5) ** -2),
)
EMBED_SCALE = Codec(("hidden_act",), lambda raw, fields: {"embed.scale": fields["width"] ** 0.5})
GEMMA2 = replace(
  LLAMA, name="gemma2", architecture="Gemma2ForCausalLM",
  keys=without(llama_keys(2304, 26, 8, 9216, 256_000, 8192, head_dim=256), "hidden_act")
  | BIAS
  | {
    "num_key_value_heads": Key("kv_heads", 4),
    "hidden_activation": Key("activation", "gelu_pytorch_tanh", GATED),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "use_bidirectional_attention": only(None, False),
    "query_pre_attn_scalar": Key("attention.scale", 256, GEMMA_SCALE),
    "attn_logit_softcapping": Key("attention.softcap", 50.0, null=0.0),
    "final_logit_softcapping": Key("embed.logit_softcap", 30.0, null=0.0),
  },
  fixed={"norm.place": "sandwich"},
  codecs=(rope(), gemma_layers(2), EMBED_SCALE, DIVIDES),
  tensors=LLAMA.tensors
  | {
    L + "post_attention_layernorm": B + "attention_out_norm",
    L + "pre_feedforward_layernorm": B + "mlp_norm",
    L + "post_feedforward_layernorm": B + "mlp_out_norm",
  },
  offset=1.0,
)
GEMMA3_ROPE = rope(theta=1_000_000.0, local_key="rope_local_base_freq")
GEMMA3 = replace(
  GEMMA2, name="gemma3_text", architecture="Gemma3ForCausalLM",
  keys=GEMMA2.keys
  | sizes(2304, 26, 8, 9216, 262_208, 131_072)
  | {
    "attn_logit_softcapping": only(None),
    "final_logit_softcapping": Key("embed.logit_softcap", 0.0, null=0.0),
  },
  fixed={"norm.place": "sandwich", "attention.qk_norm": "head"},
  codecs=(GEMMA3_ROPE, gemma_layers(6), EMBED_SCALE, DIVIDES),
)
LAYER_NORM = {"norm.kind": "layer", "norm.bias": True, "mlp_bias": True}
LEARNED = LAYER_NORM | {"attention.bias": "all", "position.kind": "learned"}
QKV = (A + "query_dnh", A + "key_dkh", A + "value_dkh")
QKV_BIAS = (A + "query_bias_nh", A + "key_bias_kh", A + "value_bias_kh")
G = "transformer.h.{l}."
GPT2 = Family(
  "gpt2", "GPT2LMHeadModel",
  {
    "vocab_size": Key("vocab_size", 50_257),
    "n_embd": Key("width", 768, other="hidden_size"),
    "n_layer": Key("layers", 12, other="num_hidden_layers"),
    "n_head": Key("heads", 12, other="num_attention_heads"),
    "n_inner": Key("mlp_width", lambda fields: 4 * fields["width"]),
    "n_positions": Key("max_seq_len", 1024, other="max_position_embeddings"),
    "activation_function": Key("activation", "gelu_new", PLAIN),
    "layer_norm_epsilon": Key("norm.eps", 1e-5),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
    "reorder_and_upcast_attn": only(False, True),
  },
  {
    "transformer.wte.weight": ("vd", "embed/token_vd"),
    "transformer.wpe.weight": ("td", "embed/position_td"),
    G + "ln_1": B + "attention_norm",
    G + "attn.c_attn.weight": ("d(nh+kh+kh)", QKV),
    G + "attn.c_attn.bias": ("(nh+kh+kh)", QKV_BIAS),
    G + "attn.c_proj.weight": ("(nh)d", A + "out_nhd"),
    G + "attn.c_proj.bias": ("d", A + "out_bias_d"),
    G + "ln_2": B + "mlp_norm",
    G + "mlp.c_fc.weight": ("df", B + "mlp/up_df"),
    G + "mlp.c_fc.bias": ("f", B + "mlp/up_bias_f"),
    G + "mlp.c_proj.weight": ("fd", B + "mlp/down_fd"),
    G + "mlp.c_proj.bias": ("d", B + "mlp/down_bias_d"),
    "transformer.ln_f": "decoder/norm",
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  fixed=LEARNED,
  aliases=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
  ignore=(r"\.attn\.(bias|masked_bias)$",),
)
X = "gpt_neox.layers.{l}."
NEOX = Family(
  "gpt_neox", "GPTNeoXForCausalLM",
  sizes(6144, 44, 64, 24_576, 50_432, 2048)
  | {
    "hidden_act": Key("activation", "gelu", PLAIN),
    "layer_norm_eps": Key("norm.eps", 1e-5),
    "tie_word_embeddings": Key("tie_embeddings", False),
    "use_parallel_residual": Key("block", True, {True: "parallel", False: "sequential"}),
    "attention_bias": replace(BIAS["attention_bias"], default=True),
    "is_decoder": only(False, True),
  },
  {
    "gpt_neox.embed_in.weight": ("vd", "embed/token_vd"),
    X + "input_layernorm": B + "attention_norm",
    X + "attention.query_key_value.weight": ("(n*h)d", QKV),
    X + "attention.query_key_value.bias": ("(n*h)", QKV_BIAS),
    X + "attention.dense": A + "out",
    X + "post_attention_layernorm": B + "mlp_norm",
    X + "mlp.dense_{h_to_4h,4h_to_h}": B + "mlp/{up,down}",
    "gpt_neox.final_layer_norm": "decoder/norm",
    "embed_out.weight": ("vd", "embed/head_dv"),
  },
  (rope("rotary_emb_base", fraction_key="rotary_pct", fraction=0.25), DIVIDES),
  LAYER_NORM,
  aliases=(
    (r"^(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1."),
    (r"^lm_head\.weight$", "embed_out.weight"),
  ),
  ignore=(r"rotary_emb\.inv_freq$", r"attention\.(bias|masked_bias)$"),
)
DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GEMMA3, GPT2, NEOX, PHI3)
