"""The tables of BERT, RoBERTa and T5.

Sources: as in `hf_decoders`.
"""

from llmjax.models.config import ModelConfig
from llmjax.models.hf_decoders import LAYER_NORM, linear, norm
from llmjax.models.hf_family import Family, Key, Part, only
from llmjax.nn.mlp import GATED

B = "encoder/blocks/"
A = B + "attention/"
M = B + "mlp/"
L = "bert.encoder.layer.{l}."
E = "bert.embeddings."


def renamed(table: dict, *pairs: tuple) -> dict:
  """The same rows under other names: each pair replaces a piece of theirs."""
  made = {}
  for name, row in table.items():
    for old, new in pairs:
      name = name.replace(old, new)
    made[name] = row
  return made


ENCODER_KEYS = {
  "hidden_size": Key("width"),
  "num_hidden_layers": Key("layers"),
  "num_attention_heads": Key("heads"),
  "intermediate_size": Key("mlp_width"),
  "layer_norm_eps": Key("norm.eps", 1e-12),
}
BERT_KEYS = ENCODER_KEYS | {
  "vocab_size": Key("vocab_size"),
  "max_position_embeddings": Key("context", 512),
  "type_vocab_size": Key("embed.types", 2),
  "tie_word_embeddings": Key("tie_embeddings", True),
  "hidden_act": Key("activation", "gelu", {"gelu": "gelu"}),
  "position_embedding_type": only("absolute"),
  "is_decoder": only(False),
  "add_cross_attention": only(False),
}
BERT_FIXED = LAYER_NORM | {
  "kind": "encoder",
  "norm.place": "post",
  "attention.bias": "all",
  "position.kind": "learned",
  "embed.norm": True,
  "embed.head_bias": True,
}
BERT_TENSORS = {
  E + "word_embeddings.weight": ("vd", "embed/token_vd"),
  E + "position_embeddings.weight": ("td", "embed/position_td"),
  E + "token_type_embeddings.weight": ("id", "embed/type_id"),
  **norm(E + "LayerNorm", "embed/norm"),
  **linear(L + "attention.self.query", A + "query", "nh", "d"),
  **linear(L + "attention.self.key", A + "key", "kh", "d"),
  **linear(L + "attention.self.value", A + "value", "kh", "d"),
  **linear(L + "attention.output.dense", A + "out", "d", "nh"),
  **norm(L + "attention.output.LayerNorm", B + "attention_norm"),
  **linear(L + "intermediate.dense", M + "up", "f", "d"),
  **linear(L + "output.dense", M + "down", "d", "f"),
  **norm(L + "output.LayerNorm", B + "mlp_norm"),
  **linear("bert.pooler.dense", "pooler", "d", "i"),
  **linear("cls.predictions.transform.dense", "transform", "d", "i"),
  **norm("cls.predictions.transform.LayerNorm", "transform_norm"),
  "cls.predictions.decoder.weight": ("vd", "embed/head_dv"),
  "cls.predictions.bias": ("v", "embed/head_bias_v"),
}
BERT_COMMON = {
  "ignore": (r"embeddings\.(position_ids|token_type_ids)$",),
  "dropped": (r"^cls\.seq_relationship\.", r"^classifier\.", r"^qa_outputs\."),
  "optional": (r"^transform", r"^pooler", r"^embed/head_bias_v$"),
}
BERT = Family(
  "bert",
  "BertForMaskedLM",
  BERT_KEYS,
  BERT_FIXED,
  (),
  BERT_TENSORS,
  aliases=(
    (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
  ),
  twins={
    "cls.predictions.decoder.weight": E + "word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
  **BERT_COMMON,
)
# Positions begin after the padding id, so the table has two rows more than there are positions.
UNUSED_ROWS = 2


def _read_roberta(theirs, values):
  return {"context": theirs.get("max_position_embeddings", 512) - UNUSED_ROWS}


ROBERTA = Family(
  "roberta",
  "RobertaForMaskedLM",
  {name: key for name, key in BERT_KEYS.items() if name != "max_position_embeddings"}
  | {"pad_token_id": only(UNUSED_ROWS - 1)},
  BERT_FIXED,
  (
    Part(
      ("max_position_embeddings",),
      _read_roberta,
      lambda config: {"max_position_embeddings": config.context + UNUSED_ROWS},
    ),
  ),
  renamed(
    BERT_TENSORS,
    ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    ("cls.predictions.transform.", "lm_head."),
    ("cls.predictions.", "lm_head."),
    ("bert.", "roberta."),
  )
  | {
    "roberta.embeddings.position_embeddings.weight": (f"({UNUSED_ROWS}+t)d", "embed/position_td"),
  },
  aliases=((r"^(embeddings|encoder|pooler)\.", r"roberta.\1."),),
  twins={
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
  },
  **BERT_COMMON,
)


def _read_t5(theirs, values):
  layers = theirs.get("num_decoder_layers") or theirs.get("num_layers")
  scaled = theirs.get("scale_decoder_outputs")
  if scaled is None:
    scaled = theirs.get("tie_word_embeddings", True)
  return {
    "layers": layers,
    "context": theirs.get("n_positions") or 512,
    "embed.logit_scale": values["width"] ** -0.5 if scaled else 1.0,
    "tie_embeddings": theirs.get("tie_word_embeddings", True),
  }


def _write_t5(config: ModelConfig):
  return {
    "num_decoder_layers": config.layers,
    "n_positions": config.context,
    "scale_decoder_outputs": config.embed.logit_scale != 1,
    "tie_word_embeddings": config.tie_embeddings,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
  }


def _t5_stack(theirs: str, ours: str, mlp: int) -> dict:
  """Rows of one of T5's stacks; `mlp` is the number of its feed-forward layer."""
  block, to = theirs + ".block.{l}.layer.", f"{ours}/blocks/"
  made = {
    f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
      "in",
      f"{ours}/relative_in",
    ),
    **norm(f"{block}{mlp}.layer_norm", to + "mlp_norm"),
    **norm(f"{theirs}.final_layer_norm", f"{ours}/norm"),
    f"{block}{mlp}.DenseReluDense.wo.weight": ("df", to + "mlp/down_fd"),
  }
  looks = (
    (0, "SelfAttention", "attention", "attention_norm"),
    (1, "EncDecAttention", "cross_attention", "cross_norm"),
  )
  for number, name, path, normed in looks[:mlp]:
    at = f"{block}{number}.{name}."
    made |= {
      **norm(f"{block}{number}.layer_norm", to + normed),
      **linear(at + "q", f"{to}{path}/query", "nh", "d"),
      **linear(at + "k", f"{to}{path}/key", "kh", "d"),
      **linear(at + "v", f"{to}{path}/value", "kh", "d"),
      **linear(at + "o", f"{to}{path}/out", "d", "nh"),
    }
  return made


def _t5_hidden(config: ModelConfig) -> dict:
  """Rows of the hidden projections, whose names say whether they are gated."""
  names = {"wi_0": "gate_df", "wi_1": "up_df"} if config.activation in GATED else {"wi": "up_df"}
  return {
    f"{stack}.block.{{l}}.layer.{mlp}.DenseReluDense.{theirs}.weight": (
      "fd",
      f"{stack}/blocks/mlp/{ours}",
    )
    for stack, mlp in (("encoder", 1), ("decoder", 2))
    for theirs, ours in names.items()
  }


T5 = Family(
  "t5",
  "T5ForConditionalGeneration",
  {
    "vocab_size": Key("vocab_size"),
    "d_model": Key("width"),
    "d_kv": Key("head_dim", 64),
    "d_ff": Key("mlp_width"),
    "num_layers": Key("encoder_layers"),
    "num_heads": Key("heads"),
    "relative_attention_num_buckets": Key("position.buckets", 32),
    "relative_attention_max_distance": Key("position.max_distance", 128),
    "layer_norm_epsilon": Key("norm.eps", 1e-6),
    "feed_forward_proj": Key(
      "activation",
      "relu",
      {
        "relu": "relu",
        "gated-gelu": "geglu_tanh",
        "gated-silu": "swiglu",
        "gated-relu": "reglu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "silu": "silu",
      },
    ),
    "decoder_start_token_id": Key("embed.start_token", 0, null=0),
    "is_encoder_decoder": only(True),
    "is_decoder": only(False),
  },
  {"kind": "encoder_decoder", "position.kind": "relative", "attention.scale": 1.0},
  (
    Part(
      (
        "num_decoder_layers",
        "n_positions",
        "scale_decoder_outputs",
        "tie_word_embeddings",
        "dense_act_fn",  # transformers derives these two from feed_forward_proj
        "is_gated_act",
      ),
      _read_t5,
      _write_t5,
    ),
  ),
  {
    "shared.weight": ("vd", "embed/token_vd"),
    **_t5_stack("encoder", "encoder", 1),
    **_t5_stack("decoder", "decoder", 2),
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  rows=_t5_hidden,
  ignore=(r"EncDecAttention\.relative_attention_bias",),
  twins={
    "lm_head.weight": "shared.weight",
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
  },
  head_optional=True,
)
