"""Tiny GGUF files of random weights, laid out as llama.cpp's converter lays out a Llama.

Names, metadata and the order of rotary rows are written here by hand, from the format's
description; `gguf` only packs the bytes.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
  "model_type": "llama",
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 40,
  "vocab_size": 61,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
}
IDS = np.random.default_rng(1).integers(0, 37, (2, 17))
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def draw(config: dict = CONFIG) -> dict[str, np.ndarray]:
  """Draws a Llama's weights under transformers' names, large enough that every layer matters."""
  rng = np.random.default_rng(0)
  d, f, v = (config[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
  q, kv = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
  shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
  shapes["model.norm.weight"] = (d,)
  for i in range(config["num_hidden_layers"]):
    attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
    shapes |= {attention + "q_proj.weight": (q, d), attention + "o_proj.weight": (d, q)}
    shapes |= {attention + f"{name}_proj.weight": (kv, d) for name in "kv"}
    shapes |= {mlp + f"{name}_proj.weight": (f, d) for name in ("gate", "up")}
    shapes[mlp + "down_proj.weight"] = (d, f)
    for name in ("input", "post_attention"):
      shapes[f"model.layers.{i}.{name}_layernorm.weight"] = (d,)
  drawn = {name: rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
  return {
    name: (array + (array.ndim == 1)).astype(np.float32) for name, array in drawn.items()
  }


def write_folder(folder: Path, tensors: dict, config: dict = CONFIG):
  """Writes `config.json` and `model.safetensors`."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gguf_name(name: str) -> str:
  """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
  stem, _, kind = name.rpartition(".")
  if stem.startswith("model.layers."):
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest]}.{kind}"
  return f"{NAMES[stem]}.{kind}"


def pairs_side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
  """Moves the rows of a head from first halves, second halves to pair after pair."""
  made = np.empty_like(rows)
  h = len(rows) // heads
  for head in range(heads):
    for i in range(h // 2):
      made[head * h + 2 * i] = rows[head * h + i]
      made[head * h + 2 * i + 1] = rows[head * h + h // 2 + i]
  return made


def llama_metadata(config: dict) -> dict:
  """A Llama `config.json` as GGUF keys."""
  return {
    "llama.block_count": config["num_hidden_layers"],
    "llama.context_length": config["max_position_embeddings"],
    "llama.embedding_length": config["hidden_size"],
    "llama.feed_forward_length": config["intermediate_size"],
    "llama.attention.head_count": config["num_attention_heads"],
    "llama.attention.head_count_kv": config["num_key_value_heads"],
    "llama.attention.key_length": config["head_dim"],
    "llama.attention.value_length": config["head_dim"],
    "llama.rope.dimension_count": config["head_dim"],
    "llama.rope.freq_base": float(config["rope_theta"]),
    "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
  }


def llama_tensors(tensors: dict, config: dict) -> dict:
  """A Llama's tensors under their GGUF names; rows may be numbers or the bytes of blocks."""
  made = {}
  for name, rows in tensors.items():
    if "q_proj" in name:
      rows = pairs_side_by_side(rows, config["num_attention_heads"])
    if "k_proj" in name:
      rows = pairs_side_by_side(rows, config["num_key_value_heads"])
    made[gguf_name(name)] = rows
  return made


def write(
  path: Path, arch: str, metadata: dict, tensors: dict, types: dict | None = None, split: int = 0,
  first_small: bool = False,
):
  """Writes a file, or several.

  Args:
    path: of the file.
    arch: `general.architecture`.
    metadata: values by key: int, float, bool, str or a list of one of them.
    tensors: arrays by name; float32 and float16 as they are, uint8 as blocks of `types[name]`.
    types: quantization of the uint8 ones.
    split: tensors of a file; 0 writes one file.
    first_small: the first of several files holds no tensor.
  """
  writer = gguf.GGUFWriter(path, arch, split_max_tensors=split, small_first_shard=first_small)
  for key, value in metadata.items():
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
  for name, array in tensors.items():
    writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
