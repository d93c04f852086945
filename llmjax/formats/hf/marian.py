"""The table of Marian's translation models: source and target may each have a vocabulary.

Source: transformers' configuration and modeling files of Marian; Junczys-Dowmunt et al. 2018,
arXiv:1804.00344.
"""

from llmjax.core.errors import UserError
from llmjax.formats.hf.family import Family, Key, Part, only
from llmjax.models.config import ModelConfig

# Keys of which encoder and decoder have one each: ours, and what theirs is where it is missing.
_PAIRS = {"attention_heads": ("heads", 16), "ffn_dim": ("mlp_width", 4096)}


def _read(theirs: dict, values: dict) -> dict:
  """Vocabularies, and what both stacks must have alike."""
  for name, (ours, default) in _PAIRS.items():
    decoders = theirs.get(f"decoder_{name}", default)
    if values[ours] != decoders:
      raise UserError(
        f"marian with encoder_{name}={values[ours]} and decoder_{name}={decoders} is not known; "
        "they must be equal"
      )
  source = theirs.get("vocab_size", 58101)
  target = theirs.get("decoder_vocab_size") or source
  if not theirs.get("share_encoder_decoder_embeddings", True):
    return {"vocab_size": target, "source_vocab_size": source}
  if target != source:
    raise UserError(
      f"marian with share_encoder_decoder_embeddings, but vocab_size {source} and "
      f"decoder_vocab_size {target}"
    )
  return {"vocab_size": source}


def _write(config: ModelConfig) -> dict:
  source = config.source_vocab_size
  return {
    "vocab_size": source or config.vocab_size,
    "decoder_vocab_size": config.vocab_size,
    "share_encoder_decoder_embeddings": not source,
    "decoder_attention_heads": config.heads,
    "decoder_ffn_dim": config.mlp_width,
    "pad_token_id": max(config.embed.start_token, 0),
  }


def _stack(side: str) -> dict:
  """Rows that both stacks have."""
  layer, ours = f"model.{side}.layers.{{l}}.", f"{side}/blocks/"
  return {
    layer + "self_attn.{q,k,v,out}_proj": ours + "attention/{query,key,value,out}",
    layer + "self_attn_layer_norm": ours + "attention_norm",
    layer + "{fc1,fc2}": ours + "mlp/{up,down}",
    layer + "final_layer_norm": ours + "mlp_norm",
  }


D = "model.decoder.layers.{l}."
MARIAN = Family(
  "marian", "MarianMTModel",
  {
    "d_model": Key("width", 1024, other="hidden_size"),
    "encoder_layers": Key("encoder_layers", 12, other="num_hidden_layers"),
    "decoder_layers": Key("layers", 12),
    "encoder_attention_heads": Key("heads", 16, other="num_attention_heads"),
    "encoder_ffn_dim": Key("mlp_width", 4096),
    "max_position_embeddings": Key("max_seq_len", 1024),
    "activation_function": Key(
      "activation", "gelu",
      {"gelu": "gelu", "swish": "silu", "silu": "silu", "relu": "relu", "gelu_new": "gelu_tanh"},
    ),
    "scale_embedding": Key(
      "embed.scale", False,
      (lambda yes, values: values["width"] ** 0.5 if yes else 1.0, lambda scale, _: scale != 1),
    ),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "decoder_start_token_id": Key(
      "embed.start_token", 58100, (lambda number, _: number, lambda number, _: max(number, 0))
    ),
    "is_encoder_decoder": only(True),
    "is_decoder": only(False),
  },
  {
    "model.decoder.embed_tokens.weight": ("vd", "embed/token_vd"),
    "model.encoder.embed_tokens.weight": ("vd", "source_embed/token_vd"),
    **_stack("encoder"),
    **_stack("decoder"),
    D + "encoder_attn.{q,k,v,out}_proj": "decoder/blocks/cross_attention/{query,key,value,out}",
    D + "encoder_attn_layer_norm": "decoder/blocks/cross_norm",
    "lm_head.weight": ("vd", "embed/head_dv"),
    "final_logits_bias": ("1v", "embed/head_bias_v"),
  },
  (
    Part(
      (
        "vocab_size", "decoder_vocab_size", "share_encoder_decoder_embeddings",
        "decoder_attention_heads", "decoder_ffn_dim",
        # what only training reads
        "dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std",
      ),
      _read, _write,
    ),
  ),
  {
    "kind": "encoder_decoder", "position.kind": "sinusoidal_halves", "norm.kind": "layer",
    "norm.bias": True, "norm.place": "post", "norm.eps": 1e-5, "attention.bias": "all",
    "mlp_bias": True, "embed.head_bias": True,
  },
  aliases=((r"^model\.shared\.", "model.decoder.embed_tokens."),),
  twins={"model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight"},
  ignore=(r"embed_positions\.weight$",),
  head_optional=True,
)
