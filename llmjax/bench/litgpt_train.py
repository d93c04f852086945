"""litgpt as a peer of training: its `GPT`, eager, with the step of `torch_peers`."""

from pathlib import Path

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file

from llmjax.bench.peers import Spec
from llmjax.bench.sizes import NORM_EPS, ROPE_THETA, SIZES
from llmjax.bench.torch_peers import prepare_step


def train(spec: Spec):
  """Prepares litgpt's `GPT` of the same architecture, with the same weights."""
  size = SIZES[spec.size]
  config = Config.from_name(
    "Llama-2-7b-hf",
    block_size=size.length,
    vocab_size=size.vocab_size,
    padded_vocab_size=size.vocab_size,
    n_layer=size.layers,
    n_head=size.heads,
    n_embd=size.width,
    norm_eps=NORM_EPS,
    intermediate_size=size.mlp_width,
    rope_base=int(ROPE_THETA),
  )
  weights = {}
  copy_weights_hf_llama(config, {}, weights, load_file(Path(spec.folder, "model.safetensors")))
  model = GPT(config)
  model.load_state_dict(weights)
  return prepare_step(spec, model, model)
