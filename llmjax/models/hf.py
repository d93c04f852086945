"""Hugging Face folders: one table a family, read by one function.

A row says where a tensor comes from and how: our path, their name, and the einsum-like letters of
theirs, from which the transposition and the split of heads follow.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.decoder import Decoder, abstract
from llmjax.models.model import Model

# our path → (their name, their letters); parentheses join what they keep as one dimension.
LLAMA = {
  "embed/token_vd": ("model.embed_tokens.weight", "vd"),
  "embed/head_dv": ("lm_head.weight", "vd"),
  "norm/scale_d": ("model.norm.weight", "d"),
  "blocks/attention_norm/scale_d": ("model.layers.{l}.input_layernorm.weight", "d"),
  "blocks/attention/query_dnh": ("model.layers.{l}.self_attn.q_proj.weight", "(nh)d"),
  "blocks/attention/key_dkh": ("model.layers.{l}.self_attn.k_proj.weight", "(kh)d"),
  "blocks/attention/value_dkh": ("model.layers.{l}.self_attn.v_proj.weight", "(kh)d"),
  "blocks/attention/out_nhd": ("model.layers.{l}.self_attn.o_proj.weight", "d(nh)"),
  "blocks/mlp_norm/scale_d": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
  "blocks/mlp/gate_df": ("model.layers.{l}.mlp.gate_proj.weight", "fd"),
  "blocks/mlp/up_df": ("model.layers.{l}.mlp.up_proj.weight", "fd"),
  "blocks/mlp/down_fd": ("model.layers.{l}.mlp.down_proj.weight", "df"),
}


def llama_config(config: dict) -> ModelConfig:
  """Translates a Llama `config.json`; weights stay fp32 and so does the arithmetic."""
  rope = config.get("rope_parameters") or {}
  if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
    raise UserError("this Llama folder scales its rotary positions, which is not supported yet")
  for key in ("attention_bias", "mlp_bias"):
    if config.get(key):
      raise UserError(f"this Llama folder sets {key}, which is not supported yet")
  return ModelConfig(
    layers=config["num_hidden_layers"],
    width=config["hidden_size"],
    heads=config["num_attention_heads"],
    kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
    head_dim=config.get("head_dim") or 0,
    mlp_width=config["intermediate_size"],
    vocab_size=config["vocab_size"],
    context=config["max_position_embeddings"],
    rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
    norm_eps=config["rms_norm_eps"],
    tie_embeddings=config.get("tie_word_embeddings", False),
    dtype="float32",
  )


FAMILIES = {"llama": (llama_config, LLAMA)}


def is_folder(path) -> bool:
  """Tells a Hugging Face folder by its `config.json` with a `model_type`."""
  try:
    return "model_type" in json.loads((Path(path) / "config.json").read_text())
  except (OSError, json.JSONDecodeError):
    return False


def load_folder(path) -> Model:
  """Loads a folder of `config.json` and safetensors.

  Raises:
    UserError: a family without a table, or a tensor that is missing or of another shape.
  """
  path = Path(path)
  config = json.loads((path / "config.json").read_text())
  if config["model_type"] not in FAMILIES:
    raise UserError(f"model_type {config['model_type']!r} is not one of {', '.join(FAMILIES)}")
  translate, table = FAMILIES[config["model_type"]]
  tensors = {}
  for file in sorted(path.glob("*.safetensors")):
    tensors.update(load_file(file))
  model_config = translate(config)
  return Model(model_config, from_tensors(model_config, tensors, table))


def from_tensors(config: ModelConfig, tensors: dict, table: dict) -> Decoder:
  """Builds a decoder from tensors under another project's names.

  Args:
    config: the architecture.
    tensors: numpy arrays by their name.
    table: our path → (their name, their letters).
  Returns:
    The module, fp32.
  Raises:
    UserError: a tensor is missing, is of another shape, or is left over.
  """
  left = dict(tensors)
  if config.tie_embeddings:
    left.pop("lm_head.weight", None)

  def take(path, like):
    name, letters = table[path]
    if "{l}" not in name:
      return _fit(left, name, letters, path, like.shape, config)
    layers = [
      _fit(left, name.format(l=i), letters, path, like.shape[1:], config)
      for i in range(config.layers)
    ]
    return np.stack(layers)

  made = tree.map_with_path(take, abstract(config))
  if left:
    names = ", ".join(sorted(left)[:4])
    raise UserError(f"{len(left)} tensors have no place in the model: {names}")
  return jax.tree.map(jnp.asarray, made)


def _fit(tensors, name, letters, path, shape, config):
  if name not in tensors:
    raise UserError(f"tensor {name!r} (for {path!r}) is missing")
  array = np.asarray(tensors.pop(name), np.float32)
  flat = letters.replace("(", "").replace(")", "")
  split = [config.dims[letter] for letter in flat]
  if array.size != int(np.prod(split)):
    raise UserError(f"tensor {name!r} has shape {array.shape}, which is not {letters} = {split}")
  ours = path.rsplit("_", 1)[-1]
  return array.reshape(split).transpose([flat.index(letter) for letter in ours]).reshape(shape)
