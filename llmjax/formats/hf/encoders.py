"""The tables of BERT and RoBERTa. Sources: as in `hf.decoders`."""

import dataclasses

from llmjax.formats.hf.decoders import LEARNED, sizes
from llmjax.formats.hf.family import Family, Key, only

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
# RoBERTa's positions begin after the padding id, so its table has two rows more.
UNUSED_ROWS = 2
POSITIONS = (lambda rows, _: rows - UNUSED_ROWS, lambda length, _: length + UNUSED_ROWS)


def _roberta(name: str) -> str:
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
    "max_position_embeddings": Key("max_seq_len", 512, POSITIONS),
    "pad_token_id": only(UNUSED_ROWS - 1),
  },
  tensors={_roberta(name): row for name, row in BERT.tensors.items()}
  | {_roberta(E) + "position_embeddings.weight": (f"({UNUSED_ROWS}+t)d", "embed/position_td")},
  aliases=((r"^(embeddings|encoder|pooler)\.", r"roberta.\1."),),
  twins={"lm_head.decoder.bias": "lm_head.bias"},
)
