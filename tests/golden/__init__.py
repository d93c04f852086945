"""A tiny random Llama in Hugging Face's layout, with what transformers says of it.

`make test-oracle` makes these files anew with torch and compares; `make test` reads them. Weights
are drawn with numpy, so that both sides need no more than the seed.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
CONFIG = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
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
  "attention_bias": False,
  "mlp_bias": False,
  "tie_word_embeddings": False,
}


def tensors() -> dict[str, np.ndarray]:
  """Draws the weights; large enough that every layer matters to the logits."""
  rng = np.random.default_rng(0)
  c = CONFIG
  d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
  q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
  shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
  shapes["model.norm.weight"] = (d,)
  for i in range(c["num_hidden_layers"]):
    layer = f"model.layers.{i}."
    shapes |= {
      layer + "input_layernorm.weight": (d,),
      layer + "post_attention_layernorm.weight": (d,),
      layer + "self_attn.q_proj.weight": (q, d),
      layer + "self_attn.k_proj.weight": (kv, d),
      layer + "self_attn.v_proj.weight": (kv, d),
      layer + "self_attn.o_proj.weight": (d, q),
      layer + "mlp.gate_proj.weight": (f, d),
      layer + "mlp.up_proj.weight": (f, d),
      layer + "mlp.down_proj.weight": (d, f),
    }
  draw = {name: rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
  return {
    name: (array + 1 if "norm" in name else array).astype(np.float32)
    for name, array in draw.items()
  }


def token_ids() -> np.ndarray:
  """Draws the inputs: [2, 17] ids, of which the first 16 are read and the last 16 predicted."""
  return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 17))


def write_checkpoint(folder: Path):
  """Writes `config.json` and `model.safetensors` as transformers would."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
  save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
