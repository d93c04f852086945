"""The tables of families with images: ViT, LLaVA (CLIP, a projector, Llama), and Gemma 3's shell.

Sources: as in `hf_decoders`.
"""

import dataclasses
import re

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig, VisionConfig
from llmjax.models.hf_decoders import (
  GEMMA3,
  LAYER_NORM,
  LLAMA,
  LLAMA_TENSORS,
  MISTRAL,
  PLAIN,
  linear,
  norm,
)
from llmjax.models.hf_encoders import BERT_TENSORS, ENCODER_KEYS, A, B, L, M, renamed
from llmjax.models.hf_family import (
  Family,
  Key,
  Part,
  canonical,
  misfits,
  only,
  read_values,
  write_config,
)

CLIP_IMAGE = {
  "image_size": Key("vision.image_size"),
  "patch_size": Key("vision.patch"),
  "num_channels": Key("vision.channels", 3),
}


def _read_vit(theirs, values):
  return {"vocab_size": theirs.get("num_labels") or len(theirs.get("id2label") or "ab")}


def _write_vit(config):
  names = [f"LABEL_{i}" for i in range(config.vocab_size)]
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }


VIT_BLOCKS = {
  **norm("vit.encoder.layer.{l}.layernorm_before", B + "attention_norm"),
  **renamed(
    {name: row for name, row in BERT_TENSORS.items() if L in name and "LayerNorm" not in name},
    ("bert.", "vit."),
    ("attention.self.", "attention.attention."),
  ),
  **norm("vit.encoder.layer.{l}.layernorm_after", B + "mlp_norm"),
}


def _inside(table: dict, folder: str) -> dict:
  """The same rows for weights that stand deeper in our tree."""
  deeper = lambda paths: paths if isinstance(paths, str) else paths[0]  # noqa: E731
  return {name: (letters, folder + deeper(paths)) for name, (letters, paths) in table.items()}


VIT = Family(
  "vit",
  "ViTForImageClassification",
  ENCODER_KEYS
  | CLIP_IMAGE
  | {"hidden_act": Key("activation", "gelu", PLAIN), "qkv_bias": only(True)},
  LAYER_NORM
  | {
    "kind": "vision",
    "attention.bias": "all",
    "position.kind": "learned",
    "vision.class_token": True,
    "vision.patch_bias": True,
  },
  (Part(("encoder_stride", "pooler_act", "pooler_output_size"), _read_vit, _write_vit),),
  {
    "vit.embeddings.cls_token": ("11d", "vision/class_d"),
    "vit.embeddings.position_embeddings": ("1td", "vision/position_td"),
    "vit.embeddings.patch_embeddings.projection.weight": ("dI", "vision/patch_id"),
    "vit.embeddings.patch_embeddings.projection.bias": ("d", "vision/patch_bias_d"),
    **_inside(VIT_BLOCKS, "vision/"),
    **norm("vit.layernorm", "vision/encoder/norm"),
    "classifier.weight": ("vd", "head/head_dv"),
    "classifier.bias": ("v", "head/head_bias_v"),
  },
  aliases=((r"^(embeddings|encoder|layernorm)\.", r"vit.\1."),),
  dropped=(r"^(vit\.)?pooler\.",),
  optional=(r"^head/",),
)
T = "vision_tower.vision_model."
C = T + "encoder.layers.{l}."
CLIP_BLOCKS = {
  **norm(C + "layer_norm1", B + "attention_norm"),
  **linear(C + "self_attn.q_proj", A + "query", "nh", "d"),
  **linear(C + "self_attn.k_proj", A + "key", "kh", "d"),
  **linear(C + "self_attn.v_proj", A + "value", "kh", "d"),
  **linear(C + "self_attn.out_proj", A + "out", "d", "nh"),
  **norm(C + "layer_norm2", B + "mlp_norm"),
  **linear(C + "mlp.fc1", M + "up", "f", "d"),
  **linear(C + "mlp.fc2", M + "down", "d", "f"),
}
CLIP = Family(
  "clip_vision_model",
  "CLIPVisionModel",
  CLIP_IMAGE
  | {
    "hidden_size": Key("vision.width"),
    "num_hidden_layers": Key("vision.layers"),
    "num_attention_heads": Key("vision.heads"),
    "intermediate_size": Key("vision.mlp_width"),
    "hidden_act": Key("vision.activation", "quick_gelu", PLAIN),
    "layer_norm_eps": Key("vision.eps", 1e-5),
  },
  {"vision.class_token": True, "vision.patch_bias": False, "vision.input_norm": True},
  (Part(("projection_dim", "vocab_size")),),
  {},
  written=False,
)
TEXTS = {"llama": LLAMA, "mistral": MISTRAL}
# What transformers takes a text_config to say where it is silent, as that of LLaVA 1.5 is.
LLAMA_7B = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "max_position_embeddings": 2048,
}


def _read_llava(theirs, values):
  text, tower = theirs.get("text_config") or {}, theirs.get("vision_config") or {}
  kind, tower_kind = text.get("model_type", "llama"), tower.get("model_type", "clip_vision_model")
  if kind not in TEXTS or tower_kind != CLIP.name:
    raise UserError(
      f"llava of {kind!r} and {tower_kind!r} is not supported; known: "
      f"{' or '.join(TEXTS)} with {CLIP.name}"
    )
  text = {"tie_word_embeddings": theirs.get("tie_word_embeddings", False)} | text
  made = read_values(TEXTS[kind], LLAMA_7B | text if kind == "llama" else text)
  made |= read_values(CLIP, tower)
  layer, layers = theirs.get("vision_feature_layer", -2), made["vision.layers"]
  if not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
    raise UserError(f"llava with vision_feature_layer={layer!r} is not supported; known: a layer")
  made["vision.layers"] = layer if layer > 0 else layers + 1 + layer
  image_token = theirs.get("image_token_index", theirs.get("image_token_id", 32000))
  return made | {"vision.image_token": image_token}


def _write_llava(config: ModelConfig):
  alone = canonical(dataclasses.replace(config, vision=VisionConfig()))
  fits = [family for family in TEXTS.values() if not misfits(family, alone)]
  if not fits:
    raise UserError(f"as the text model of llava, {misfits(LLAMA, alone)[0]}")
  return {
    "text_config": write_config(fits[0], alone),
    "vision_config": write_config(CLIP, config),
    "image_token_index": config.vision.image_token,
    "image_seq_length": config.vision.patches,
    "vision_feature_layer": -1,
    "tie_word_embeddings": config.tie_embeddings,
  }


def _unread_layer(name: str, config: ModelConfig) -> bool:
  """Whether a tensor is of a layer behind the one whose result LLaVA reads."""
  layer = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", name)
  return layer is not None and int(layer[1]) >= config.vision.layers


LLAVA = Family(
  "llava",
  "LlavaForConditionalGeneration",
  {
    "vision_feature_select_strategy": only("default"),
    "projector_hidden_act": only("gelu"),
    "multimodal_projector_bias": only(True),
  },
  {},
  (
    Part(
      (
        "text_config",
        "vision_config",
        "image_token_index",
        "image_token_id",
        "image_seq_length",
        "vision_feature_layer",
        "tie_word_embeddings",
        "vocab_size",
        "ignore_index",
      ),
      _read_llava,
      _write_llava,
    ),
  ),
  {
    T + "embeddings.class_embedding": ("d", "vision/class_d"),
    T + "embeddings.patch_embedding.weight": ("dI", "vision/patch_id"),
    T + "embeddings.position_embedding.weight": ("td", "vision/position_td"),
    **norm(T + "pre_layrnorm", "vision/input_norm"),
    **_inside(CLIP_BLOCKS, "vision/"),
    "multi_modal_projector.linear_1.weight": ("fi", "projector/up_if"),
    "multi_modal_projector.linear_1.bias": ("f", "projector/up_bias_f"),
    "multi_modal_projector.linear_2.weight": ("df", "projector/down_fd"),
    "multi_modal_projector.linear_2.bias": ("d", "projector/down_bias_d"),
    **{f"language_model.{name}": row for name, row in LLAMA_TENSORS.items()},
  },
  aliases=(
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", T),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
  ),
  ignore=(r"rotary_emb\.inv_freq$", r"position_ids$", r"\.post_layernorm\."),
  skip=_unread_layer,
  twins={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
  constants={
    T + "post_layernorm.weight": (1.0, T + "pre_layrnorm.weight"),
    T + "post_layernorm.bias": (0.0, T + "pre_layrnorm.bias"),
  },
)


def _read_gemma3(theirs, values):
  text = {"tie_word_embeddings": theirs.get("tie_word_embeddings", True)}
  return read_values(GEMMA3, text | theirs["text_config"])


# The text model out of a Gemma 3 with images; it is written as gemma3_text.
GEMMA3_SHELL = dataclasses.replace(
  GEMMA3,
  name="gemma3",
  keys={},
  fixed={},
  parts=(
    Part(
      (
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        "image_token_index",
        "boi_token_index",
        "eoi_token_index",
        "tie_word_embeddings",
      ),
      _read_gemma3,
    ),
  ),
  aliases=(
    (r"^language_model\.", ""),
    (r"^model\.language_model\.", "model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
  ),
  dropped=(r"^vision_tower\.", r"^multi_modal_projector\."),
  written=False,
)
