"""The tables of BERT, RoBERTa and T5.

Sources: as in `hf_decoders`.
"""

import dataclasses

from llmjax.formats.hf.decoders import LEARNED, sizes
from llmjax.formats.hf.family import Family, Key, Part, only

B = "encoder/blocks/"
E = "bert.embeddings."
L = "bert.encoder.layer.{l}."
BERT = Family(
  "bert", "BertForMaskedLM",
  sizes(768, 12, 12, 3072, 30_522, 512)
  | {
    "layer_norm_eps": Key("norm.eps", 1e-12),
    "type_vocab_size": Key("embed.types", 2),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "hidden_act": Key("activation", "gelu", {"gelu": "gelu"}),
    "position_embedding_type": only("absolute"),
    "is_decoder": only(False),
    "add_cross_attention": only(False),
  },
  {
    E + "word_embeddings.weight": ("vd", "embed/token_vd"),
    E + "position_embeddings.weight": ("td", "embed/position_td"),
    E + "token_type_embeddings.weight": ("id", "embed/type_id"),
    E + "LayerNorm": "embed/norm",
    L + "attention.self.{query,key,value}": B + "attention/{query,key,value}",
    L + "attention.output.dense": B + "attention/out",
    L + "attention.output.LayerNorm": B + "attention_norm",
    L + "{intermediate,output}.dense": B + "mlp/{up,down}",
    L + "output.LayerNorm": B + "mlp_norm",
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "transform_norm",
    "cls.predictions.decoder.weight": ("vd", "embed/head_dv"),
    "cls.predictions.bias": ("v", "embed/head_bias_v"),
  },
  fixed=LEARNED
  | {"kind": "encoder", "norm.place": "post", "embed.norm": True, "embed.head_bias": True},
  aliases=(
    (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
  ),
  ignore=(r"embeddings\.(position_ids|token_type_ids)$",),
  dropped=(r"^cls\.seq_relationship\.", r"^classifier\.", r"^qa_outputs\."),
  twins={"cls.predictions.decoder.bias": "cls.predictions.bias"},
  optional=(r"^transform", r"^pooler", r"^embed/head_bias_v$"),
)
# Positions begin after the padding id, so the table has two rows more than there are positions.
UNUSED_ROWS = 2


def _roberta(name: str) -> str:
  """RoBERTa's name of a tensor of BERT's."""
  for old, new in (
    ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    ("cls.predictions.transform.", "lm_head."),
    ("cls.predictions.", "lm_head."),
    ("bert.", "roberta."),
  ):
    name = name.replace(old, new)
  return name


ROBERTA = dataclasses.replace(
  BERT, name="roberta", architecture="RobertaForMaskedLM",
  keys=BERT.keys
  | {
    "vocab_size": Key("vocab_size", 50_265),
    "max_position_embeddings": Key(
      "max_seq_len", 512,
      (lambda rows, _: rows - UNUSED_ROWS, lambda length, _: length + UNUSED_ROWS)
    ),
    "pad_token_id": only(UNUSED_ROWS - 1),
  },
  tensors={_roberta(name): row for name, row in BERT.tensors.items()}
  | {_roberta(E) + "position_embeddings.weight": (f"({UNUSED_ROWS}+t)d", "embed/position_td")},
  aliases=((r"^(embeddings|encoder|pooler)\.", r"roberta.\1."),),
  twins={"lm_head.decoder.bias": "lm_head.bias"},
)


def _t5_stack(stack: str, mlp: str) -> dict:
  """Rows that both stacks of T5 have; `mlp` is the number of its feed-forward layer."""
  block, ours = stack + ".block.{l}.layer.", f"{stack}/blocks/"
  relative = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  return {
    relative: ("in", f"{stack}/relative_in"),
    block + "0.layer_norm": ours + "attention_norm",
    block + "0.SelfAttention.{q,k,v,o}": ours + "attention/{query,key,value,out}",
    block + mlp + ".layer_norm": ours + "mlp_norm",
    block + mlp + ".DenseReluDense.wi_{0,1}": ours + "mlp/{gate,up}",
    block + mlp + ".DenseReluDense.wi": ours + "mlp/up",
    block + mlp + ".DenseReluDense.wo": ours + "mlp/down",
    stack + ".final_layer_norm": stack + "/norm",
  }


T5_ACTIVATIONS = {
  "relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gated-relu": "reglu",
  "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu",
}
D = "decoder.block.{l}.layer.1."
T5 = Family(
  "t5", "T5ForConditionalGeneration",
  {
    "vocab_size": Key("vocab_size", 32_128),
    "d_model": Key("width", 512, other="hidden_size"),
    "d_kv": Key("head_dim", 64, other="head_dim"),
    "d_ff": Key("mlp_width", 2048),
    "num_layers": Key("encoder_layers", 6, other="num_hidden_layers"),
    "num_decoder_layers": Key("layers", lambda values: values["encoder_layers"]),
    "num_heads": Key("heads", 8, other="num_attention_heads"),
    "n_positions": Key("max_seq_len", 512),
    "relative_attention_num_buckets": Key("position.buckets", 32),
    "relative_attention_max_distance": Key("position.max_distance", 128),
    "layer_norm_epsilon": Key("norm.eps", 1e-6),
    "feed_forward_proj": Key("activation", "relu", T5_ACTIVATIONS),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "scale_decoder_outputs": Key(
      "embed.logit_scale", lambda values: values["tie_embeddings"],
      (lambda yes, values: values["width"] ** -0.5 if yes else 1.0, lambda scale, _: scale != 1),
    ),
    "decoder_start_token_id": Key(
      "embed.start_token", 0, (lambda number, _: number, lambda number, _: max(number, 0))
    ),
    "is_encoder_decoder": only(True),
    "is_decoder": only(False),
  },
  {
    "shared.weight": ("vd", "embed/token_vd"),
    **_t5_stack("encoder", "1"),
    **_t5_stack("decoder", "2"),
    D + "layer_norm": "decoder/blocks/cross_norm",
    D + "EncDecAttention.{q,k,v,o}": "decoder/blocks/cross_attention/{query,key,value,out}",
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  # transformers derives these two keys from feed_forward_proj
  (Part(("dense_act_fn", "is_gated_act"), write=lambda config: {"pad_token_id": 0}),),
  {"kind": "encoder_decoder", "position.kind": "relative", "attention.scale": 1.0},
  ignore=(r"EncDecAttention\.relative_attention_bias",),
  twins={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
  head_optional=True,
)
