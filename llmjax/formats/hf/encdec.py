"""The tables of T5 and of Marian's translation models. Sources: as in `hf.decoders`; Raffel et al.
2019, arXiv:1910.10683; Junczys-Dowmunt et al. 2018, arXiv:1804.00344."""

from llmjax.core.errors import UserError
from llmjax.formats.hf.decoders import LAYER_NORM, PLAIN
from llmjax.formats.hf.family import Codec, Family, Key, only
from llmjax.models.config import ModelConfig

_START = (lambda number, _: number, lambda number, _: max(number, 0))
SHARED_KEYS = {
  "tie_word_embeddings": Key("tie_embeddings", True),
  "is_encoder_decoder": only(True),
  "is_decoder": only(False),
}
CROSS = "decoder/blocks/cross_"
T5_ACTIVATIONS = {
  "relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gated-relu": "reglu",
  "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu",
}


def _power_of_width(power: float) -> tuple:
  """A flag that says whether activations are scaled by this power of the width."""
  return (
    lambda scaled, fields: fields["width"] ** power if scaled else 1.0,
    lambda scale, _: scale != 1,
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


T5 = Family(
  "t5", "T5ForConditionalGeneration",
  SHARED_KEYS
  | {
    "vocab_size": Key("vocab_size", 32_128),
    "d_model": Key("width", 512, other="hidden_size"),
    "d_kv": Key("head_dim", 64, other="head_dim"),
    "d_ff": Key("mlp_width", 2048),
    "num_layers": Key("encoder_layers", 6, other="num_hidden_layers"),
    "num_decoder_layers": Key("layers", lambda fields: fields["encoder_layers"]),
    "num_heads": Key("heads", 8, other="num_attention_heads"),
    "n_positions": Key("max_seq_len", 512),
    "relative_attention_num_buckets": Key("position.buckets", 32),
    "relative_attention_max_distance": Key("position.max_distance", 128),
    "layer_norm_epsilon": Key("norm.eps", 1e-6),
    "feed_forward_proj": Key("activation", "relu", T5_ACTIVATIONS),
    "scale_decoder_outputs": Key(
      "embed.logit_scale", lambda fields: fields["tie_embeddings"], _power_of_width(-0.5)
    ),
    "decoder_start_token_id": Key("embed.start_token", 0, _START),
  },
  {
    "shared.weight": ("vd", "embed/token_vd"),
    **_t5_stack("encoder", "1"),
    **_t5_stack("decoder", "2"),
    "decoder.block.{l}.layer.1.layer_norm": CROSS + "norm",
    "decoder.block.{l}.layer.1.EncDecAttention.{q,k,v,o}": CROSS
    + "attention/{query,key,value,out}",
    "lm_head.weight": ("vd", "embed/head_dv"),
  },
  # transformers derives these two keys from feed_forward_proj
  (Codec(("dense_act_fn", "is_gated_act"), write=lambda config: {"pad_token_id": 0}),),
  {"kind": "encoder_decoder", "position.kind": "relative", "attention.scale": 1.0},
  ignore=(r"EncDecAttention\.relative_attention_bias",),
  twins={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
  head_optional=True,
)


def _read_marian(raw: dict, fields: dict) -> dict:
  for name, field, default in (("attention_heads", "heads", 16), ("ffn_dim", "mlp_width", 4096)):
    decoder = raw.get(f"decoder_{name}", default)
    if fields[field] != decoder:
      raise UserError(
        f"marian with encoder_{name}={fields[field]} and decoder_{name}={decoder} is not known; "
        "they must be equal"
      )
  source = raw.get("vocab_size", 58101)
  target = raw.get("decoder_vocab_size") or source
  if not raw.get("share_encoder_decoder_embeddings", True):
    return {"vocab_size": target, "source_vocab_size": source}
  if target != source:
    raise UserError(
      f"marian with share_encoder_decoder_embeddings, but vocab_size {source} and "
      f"decoder_vocab_size {target}"
    )
  return {"vocab_size": source}


def _write_marian(config: ModelConfig) -> dict:
  source = config.source_vocab_size
  return {
    "vocab_size": source or config.vocab_size,
    "decoder_vocab_size": config.vocab_size,
    "share_encoder_decoder_embeddings": not source,
    "decoder_attention_heads": config.heads,
    "decoder_ffn_dim": config.mlp_width,
    "pad_token_id": max(config.embed.start_token, 0),
  }


_UNREAD = "dropout activation_dropout encoder_layerdrop decoder_layerdrop init_std"  # of training
MARIAN_CODEC = Codec((*_write_marian(ModelConfig()), *_UNREAD.split()), _read_marian, _write_marian)


def _marian_stack(side: str) -> dict:
  layer, ours = f"model.{side}.layers.{{l}}.", f"{side}/blocks/"
  return {
    layer + "self_attn.{q,k,v,out}_proj": ours + "attention/{query,key,value,out}",
    layer + "self_attn_layer_norm": ours + "attention_norm",
    layer + "{fc1,fc2}": ours + "mlp/{up,down}",
    layer + "final_layer_norm": ours + "mlp_norm",
  }


MARIAN = Family(
  "marian", "MarianMTModel",
  SHARED_KEYS
  | {
    "d_model": Key("width", 1024, other="hidden_size"),
    "encoder_layers": Key("encoder_layers", 12, other="num_hidden_layers"),
    "decoder_layers": Key("layers", 12),
    "encoder_attention_heads": Key("heads", 16, other="num_attention_heads"),
    "encoder_ffn_dim": Key("mlp_width", 4096),
    "max_position_embeddings": Key("max_seq_len", 1024),
    "activation_function": Key("activation", "gelu", PLAIN),
    "scale_embedding": Key("embed.scale", False, _power_of_width(0.5)),
    "decoder_start_token_id": Key("embed.start_token", 58100, _START),
  },
  {
    "model.decoder.embed_tokens.weight": ("vd", "embed/token_vd"),
    "model.encoder.embed_tokens.weight": ("vd", "source_embed/token_vd"),
    **_marian_stack("encoder"),
    **_marian_stack("decoder"),
    "model.decoder.layers.{l}.encoder_attn.{q,k,v,out}_proj": CROSS
    + "attention/{query,key,value,out}",
    "model.decoder.layers.{l}.encoder_attn_layer_norm": CROSS + "norm",
    "lm_head.weight": ("vd", "embed/head_dv"),
    "final_logits_bias": ("1v", "embed/head_bias_v"),
  },
  (MARIAN_CODEC,),
  LAYER_NORM
  | {
    "kind": "encoder_decoder", "position.kind": "sinusoidal_halves", "norm.place": "post",
    "norm.eps": 1e-5, "attention.bias": "all", "embed.head_bias": True,
  },
  aliases=((r"^model\.shared\.", "model.decoder.embed_tokens."),),
  twins={"model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight"},
  ignore=(r"embed_positions\.weight$",),
  head_optional=True,
)
