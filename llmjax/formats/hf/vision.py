"""The tables of families with images: ViT, LLaVA (CLIP, a projector, Llama), and the text model
within a Gemma 3. Sources: as in `hf.decoders`."""

import dataclasses
import re

from llmjax.core.errors import UserError
from llmjax.formats.hf.canonical import canonical
from llmjax.formats.hf.decoders import GEMMA3, LEARNED, LLAMA, MISTRAL, PLAIN, sizes
from llmjax.formats.hf.family import Codec, Family, Key, misfits, only, read_fields, write_config
from llmjax.models.config import ModelConfig, VisionConfig

B = "vision/encoder/blocks/"
TOWER = sizes(768, 12, 12, 3072)


def _image(patch: int) -> dict:
  return {
    "image_size": Key("vision.image_size", 224),
    "patch_size": Key("vision.patch", patch),
    "num_channels": Key("vision.channels", 3),
  }


CLASSES = Codec(
  ("encoder_stride", "pooler_act", "pooler_output_size"),
  lambda raw, fields: {"vocab_size": raw.get("num_labels") or len(raw.get("id2label") or "ab")},
  lambda config: {
    "id2label": {str(i): f"LABEL_{i}" for i in range(config.vocab_size)},
    "label2id": {f"LABEL_{i}": i for i in range(config.vocab_size)},
  },
)
V = "vit.embeddings."
L = "vit.encoder.layer.{l}."
VIT = Family(
  "vit", "ViTForImageClassification",
  TOWER
  | _image(16)
  | {
    "layer_norm_eps": Key("norm.eps", 1e-12),
    "hidden_act": Key("activation", "gelu", PLAIN),
    "qkv_bias": only(True),
  },
  {
    V + "cls_token": ("11d", "vision/class_d"),
    V + "position_embeddings": ("1td", "vision/position_td"),
    V + "patch_embeddings.projection.weight": ("dI", "vision/patch_id"),
    V + "patch_embeddings.projection.bias": ("d", "vision/patch_bias_d"),
    L + "layernorm_before": B + "attention_norm",
    L + "attention.attention.{query,key,value}": B + "attention/{query,key,value}",
    L + "attention.output.dense": B + "attention/out",
    L + "layernorm_after": B + "mlp_norm",
    L + "{intermediate,output}.dense": B + "mlp/{up,down}",
    "vit.layernorm": "vision/encoder/norm",
    "classifier": "head/head",
  },
  (CLASSES,),
  LEARNED | {"kind": "vision", "vision.class_token": True, "vision.patch_bias": True},
  aliases=((r"^(embeddings|encoder|layernorm)\.", r"vit.\1."),),
  dropped=(r"^(vit\.)?pooler\.",),
  optional=(r"^head/",),
)
CLIP = Family(
  "clip_vision_model", "CLIPVisionModel",
  _image(32)
  | {name: Key(f"vision.{key.field}", key.default) for name, key in TOWER.items()}
  | {
    "hidden_act": Key("vision.activation", "quick_gelu", PLAIN),
    "layer_norm_eps": Key("vision.eps", 1e-5),
  },
  {},
  (Codec(("projection_dim", "vocab_size")),),
  {"vision.class_token": True, "vision.patch_bias": False, "vision.input_norm": True},
)
TEXTS = {"llama": LLAMA, "mistral": MISTRAL}
SHELL_KEYS = ("text_config", "vision_config", "tie_word_embeddings")
LLAVA_KEYS = ("image_seq_length", "vision_feature_layer", "vocab_size", "ignore_index")
_MARKS = [f"{name}_token" for name in ("image", "boi", "eoi")]
GEMMA3_KEYS = [f"{mark}_{word}" for mark in _MARKS for word in ("id", "index")]
# What transformers takes a LLaVA without a vision_config to have.
LLAVA_TOWER = {
  "intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14, "image_size": 336,
  "num_hidden_layers": 24, "num_attention_heads": 16,
}


def _read_llava(raw, fields):
  text, tower = raw.get("text_config") or {}, raw.get("vision_config")
  tower = LLAVA_TOWER if tower is None else tower
  kind, tower_kind = text.get("model_type", "llama"), tower.get("model_type", "clip_vision_model")
  if kind not in TEXTS or tower_kind != CLIP.name:
    raise UserError(
      f"llava of {kind!r} and {tower_kind!r} is not supported; known: "
      f"{' or '.join(TEXTS)} with {CLIP.name}"
    )
  found = read_fields(TEXTS[kind], text) | read_fields(CLIP, tower)
  found["tie_embeddings"] |= raw.get("tie_word_embeddings") is True
  layer, layers = raw.get("vision_feature_layer", -2), found["vision.layers"]
  if not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
    raise UserError(f"llava with vision_feature_layer={layer!r} is not supported; known: a layer")
  found["vision.layers"] = layer if layer > 0 else layers + 1 + layer
  return found


def _write_llava(config: ModelConfig):
  text = canonical(dataclasses.replace(config, vision=VisionConfig()))
  fits = [family for family in TEXTS.values() if not misfits(family, text)]
  if not fits:
    raise UserError(f"as the text model of llava, {misfits(LLAMA, text)[0]}")
  return {
    "text_config": write_config(fits[0], text),
    "vision_config": write_config(CLIP, config),
    "image_seq_length": config.vision.patches,
    "vision_feature_layer": -1,
    "tie_word_embeddings": config.tie_embeddings,
  }


def _unread_layer(name: str, config: ModelConfig) -> bool:
  layer = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", name)
  return layer is not None and int(layer[1]) >= config.vision.layers


T = "vision_tower.vision_model."
C = T + "encoder.layers.{l}."
LLAVA = Family(
  "llava", "LlavaForConditionalGeneration",
  {
    "image_token_index": Key("vision.image_token", 32_000, other="image_token_id"),
    "vision_feature_select_strategy": only("default"),
    "projector_hidden_act": only("gelu"),
    "multimodal_projector_bias": only(True),
  },
  {
    T + "embeddings.class_embedding": ("d", "vision/class_d"),
    T + "embeddings.patch_embedding.weight": ("dI", "vision/patch_id"),
    T + "embeddings.position_embedding.weight": ("td", "vision/position_td"),
    T + "pre_layrnorm": "vision/input_norm",
    C + "layer_norm1": B + "attention_norm",
    C + "self_attn.{q,k,v,out}_proj": B + "attention/{query,key,value,out}",
    C + "layer_norm2": B + "mlp_norm",
    C + "mlp.fc{1,2}": B + "mlp/{up,down}",
    "multi_modal_projector.linear_{1,2}": "projector/{up,down}",
    **{f"language_model.{name}": row for name, row in LLAMA.tensors.items()},
  },
  (Codec(SHELL_KEYS + LLAVA_KEYS, _read_llava, _write_llava),),
  aliases=(
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", T),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
  ),
  ignore=(r"rotary_emb\.inv_freq$", r"position_ids$", r"\.post_layernorm\."),
  skip=_unread_layer,
  constants={
    T + "post_layernorm.weight": (1.0, T + "pre_layrnorm.weight"),
    T + "post_layernorm.bias": (0.0, T + "pre_layrnorm.bias"),
  },
)


GEMMA3_TEXT = Codec(
  (*SHELL_KEYS, *GEMMA3_KEYS, "mm_tokens_per_image"),
  lambda raw, fields: read_fields(GEMMA3, (raw.get("text_config") or {}) | {
    "tie_word_embeddings": raw.get("tie_word_embeddings") is not False
  }),
)
# The text model out of a Gemma 3 with images; it is written as gemma3_text.
GEMMA3_SHELL = dataclasses.replace(
  GEMMA3, name="gemma3", keys={}, fixed={},
  codecs=(GEMMA3_TEXT,),
  aliases=(
    (r"^language_model\.", ""),
    (r"^model\.language_model\.", "model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
  ),
  dropped=(r"^vision_tower\.", r"^multi_modal_projector\."),
  written=False,
)
