"""What is measured and how it is timed, the same for every peer: sizes, tokens, weights, rounds.

All sizes are Llama-type decoders with a head of their own. Weights and tokens are functions of a
fixed seed, so that losses and greedy tokens of different peers can be compared.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
PROMPT_TOKENS = 128
NEW_TOKENS = 128
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}  # torch's names


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
    return sum(math.prod(shape) for shape in _shapes(self).values())


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


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
  """Lists Hugging Face's names of a Llama's or a Mixtral's tensors, with shapes (out, in)."""
  v, d, f = size.vocab_size, size.width, size.mlp_width
  block = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
  if size.experts:
    block["block_sparse_moe.gate"] = (size.experts, d)
    for e in range(size.experts):
      sides = {"w1": (f, d), "w3": (f, d), "w2": (d, f)}
      block |= {f"block_sparse_moe.experts.{e}.{name}": side for name, side in sides.items()}
  else:
    block |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
  block |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
  shapes = {"model.embed_tokens": (v, d), "lm_head": (v, d), "model.norm": (d,)}
  for layer in range(size.layers):
    shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
  return {f"{name}.weight": shape for name, shape in shapes.items()}


def hf_config(size: Size) -> dict:
  """Describes a size as the `config.json` of a Llama or a Mixtral."""
  kind = {"model_type": "llama"}
  if size.experts:
    kind = {"model_type": "mixtral", "num_local_experts": size.experts, "num_experts_per_tok": 2}
  return kind | {
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
  }


def write_weights(size: Size, folder: Path) -> None:
  """Writes a Hugging Face folder (`config.json`, `model.safetensors`) of random fp32 weights.

  Matrices have variance 1 / fan-in, embedding and head 0.02², scales are one; so the first loss is
  near log(v), and greedy tokens depend on every layer.
  """
  rng = np.random.default_rng(0)
  tensors = {}
  for name, shape in _shapes(size).items():
    std = 0.02 if name in ("model.embed_tokens.weight", "lm_head.weight") else shape[-1] ** -0.5
    drawn = rng.standard_normal(shape, np.float32) * np.float32(std)
    tensors[name] = drawn if drawn.ndim > 1 else np.ones_like(drawn)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(hf_config(size)))


def prepare_steps(size: Size, run_step):
  """Makes a peer out of a function that does one step of training and returns its loss.

  Returns:
    (facts, measure), as `Peer.where` wants them; `measure({"seconds": s})`.
  """
  tokens = size.batch_size * size.length
  facts = {"first_loss": run_step()}
  return facts, lambda request: timed_steps(run_step, tokens, request["seconds"])


def timed_steps(run_step, tokens: int, seconds: float) -> dict:
  """Runs whole steps until `seconds` have passed.

  Args:
    run_step: does one step and returns its loss, if it has one.
    tokens: predicted a step.
  Returns:
    `tokens`, `seconds`, `tokens_per_s` and the `losses`.
  """
  losses = []
  began_s = time.perf_counter()
  while time.perf_counter() < began_s + seconds:
    losses.append(run_step())
  spent_s = time.perf_counter() - began_s
  done = tokens * len(losses)
  return {"tokens": done, "seconds": spent_s, "tokens_per_s": done / spent_s, "losses": losses}


def prepare_decode(size: Size, run):
  """Makes a peer out of a function that continues prompts.

  Args:
    run: `(rows of ids, new tokens) -> new ids of each row`, greedy, EOS ignored.
  Returns:
    As `prepare_steps`; `measure({"batch": n})`.
  """
  warm = set()

  def measure(request: dict) -> dict:
    rows = prompts(size, request["batch"])
    if request["batch"] not in warm:  # compiled, buffers made
      warm.add(request["batch"])
      run(rows, 1)
      run(rows, NEW_TOKENS)
    began_s = time.perf_counter()
    run(rows, 1)
    first_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    made = run(rows, NEW_TOKENS)
    whole_s = time.perf_counter() - began_s
    assert all(len(row) == NEW_TOKENS for row in made), "a row ended early"
    return {
      "tokens_per_s": len(rows) * NEW_TOKENS / whole_s,
      "decode_tokens_per_s": len(rows) * (NEW_TOKENS - 1) / (whole_s - first_s),
      "first_token_s": first_s,
      "ids": made[0],
    }

  run(prompts(size, 1), 1)
  return {}, measure
