"""What is measured: the sizes, the tokens, and one folder of weights that every peer reads.

Both sizes are Llama-type decoders with a head of its own. Weights and tokens are functions of a
fixed seed, so that losses and greedy tokens of different peers can be compared.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
PROMPT_TOKENS = 128
NEW_TOKENS = 128
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Size:
  """An architecture and the batch it is trained on.

  Attributes:
    vocab_size: tokens (v).
    width: residual width (d).
    layers: blocks (l).
    heads: query heads and as many key/value heads (n).
    mlp_width: feed-forward width (f).
    batch_size: rows of a training batch.
    length: positions of a row.
    experts: of each layer, two for a token, `mlp_width` wide each; 0: dense layers.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  batch_size: int
  length: int
  experts: int = 0

  @property
  def parameters(self) -> int:
    """Weights, from the shapes that are written."""
    return sum(int(np.prod(shape)) for shape, _ in _shapes(self).values())


SIZES = {
  "L": Size(8192, 512, 8, 8, 1536, 8, 256),
  "S": Size(2048, 256, 4, 4, 768, 16, 128),
  "tiny": Size(64, 16, 2, 2, 32, 2, 8),
}
# As many active FLOPs in experts: two of eight, half as wide.
SIZES |= {
  f"{name}-moe": dataclasses.replace(size, mlp_width=size.mlp_width // 2, experts=8)
  for name, size in SIZES.items()
}


def token_batches(size: Size, count: int = 4) -> np.ndarray:
  """Draws uniform token ids: int32 [count, b, t + 1], the same in every process."""
  rng = np.random.default_rng(1)
  shape = (count, size.batch_size, size.length + 1)
  return rng.integers(size.vocab_size, size=shape, dtype=np.int32)


def prompts(size: Size, batch: int) -> list[list[int]]:
  """Draws the prompts of a decoding batch, `PROMPT_TOKENS` each."""
  rng = np.random.default_rng(2)
  return rng.integers(size.vocab_size, size=(batch, PROMPT_TOKENS)).tolist()


def _shapes(size: Size) -> dict[str, tuple[tuple[int, ...], float]]:
  """Lists Hugging Face's names of a Llama's or a Mixtral's tensors, with shape and deviation."""
  v, d, f = size.vocab_size, size.width, size.mlp_width
  shapes = {
    "model.embed_tokens.weight": ((v, d), 0.02),
    "lm_head.weight": ((v, d), 0.02),
    "model.norm.weight": ((d,), 0.0),
  }
  block = {f"self_attn.{name}_proj": ((d, d), d**-0.5) for name in "qkvo"}
  if size.experts:
    block["block_sparse_moe.gate"] = ((size.experts, d), d**-0.5)
    sides = {"w1": ((f, d), d**-0.5), "w3": ((f, d), d**-0.5), "w2": ((d, f), f**-0.5)}
    for e in range(size.experts):
      block |= {f"block_sparse_moe.experts.{e}.{name}": side for name, side in sides.items()}
  else:
    block |= {f"mlp.{name}_proj": ((f, d), d**-0.5) for name in ("gate", "up")}
    block["mlp.down_proj"] = ((d, f), f**-0.5)
  block |= {f"{name}_layernorm": ((d,), 0.0) for name in ("input", "post_attention")}
  for layer in range(size.layers):
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
  return shapes


def hf_config(size: Size) -> dict:
  """Describes a size as the `config.json` of a Llama or a Mixtral."""
  name = ("MixtralForCausalLM", "mixtral") if size.experts else ("LlamaForCausalLM", "llama")
  experts = {"num_local_experts": size.experts, "num_experts_per_tok": 2} if size.experts else {}
  return experts | {
    "architectures": [name[0]],
    "model_type": name[1],
    "vocab_size": size.vocab_size,
    "hidden_size": size.width,
    "num_hidden_layers": size.layers,
    "num_attention_heads": size.heads,
    "num_key_value_heads": size.heads,
    "intermediate_size": size.mlp_width,
    "max_position_embeddings": max(size.length, PROMPT_TOKENS + NEW_TOKENS),
    "rms_norm_eps": NORM_EPS,
    "rope_theta": ROPE_THETA,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
  }


def write_weights(size: Size, folder: Path) -> None:
  """Writes a Hugging Face folder (`config.json`, `model.safetensors`) of random fp32 weights.

  Matrices have variance 1 / fan-in, embedding and head 0.02², scales are one; so the first loss is
  near log(v), and greedy tokens depend on every layer.
  """
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(std == 0)
    for name, (shape, std) in _shapes(size).items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(hf_config(size)))
