"""litgpt as a peer of training: its `GPT`, eager, with the step of `torch_train`."""

from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT
from safetensors.torch import load_file

from llmjax.bench.peers import Spec
from llmjax.bench.sizes import NORM_EPS, ROPE_THETA, SIZES
from llmjax.bench.torch_train import prepare_step


def train(spec: Spec):
  """Prepares litgpt's `GPT` of the same architecture, with the same weights."""
  size = SIZES[spec.size]
  config = Config(
    name="bench",
    block_size=size.length,
    vocab_size=size.vocab_size,
    padded_vocab_size=size.vocab_size,
    n_layer=size.layers,
    n_head=size.heads,
    n_embd=size.width,
    n_query_groups=size.heads,
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    norm_eps=NORM_EPS,
    mlp_class_name="LLaMAMLP",
    intermediate_size=size.mlp_width,
    rope_base=int(ROPE_THETA),
  )
  model = GPT(config)
  model.load_state_dict(_litgpt_names(load_file(Path(spec.folder, "model.safetensors")), size))
  return prepare_step(spec, model)


def _litgpt_names(tensors: dict, size) -> dict:
  """Renames Hugging Face's tensors; litgpt keeps query, key and value in one matrix."""
  made = {
    "lm_head.weight": tensors["lm_head.weight"],
    "transformer.wte.weight": tensors["model.embed_tokens.weight"],
    "transformer.ln_f.weight": tensors["model.norm.weight"],
  }
  names = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
  }
  for layer in range(size.layers):
    here, there = f"transformer.h.{layer}.", f"model.layers.{layer}."
    for ours, theirs in names.items():
      made[f"{here}{ours}.weight"] = tensors[f"{there}{theirs}.weight"]
    qkv = [tensors[f"{there}self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    made[f"{here}attn.qkv.weight"] = torch.cat(qkv)
  return made
