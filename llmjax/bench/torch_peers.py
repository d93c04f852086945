"""transformers as a peer of training and of decoding, litgpt as one of training.

All train the same step: forward, mean cross-entropy in fp32, backward, AdamW (the fused one,
torch's fastest); bf16 means autocast over fp32 weights.
"""

import functools
import itertools
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from llmjax.bench.sizes import (
  ADAMW,
  NORM_EPS,
  ROPE_THETA,
  SIZES,
  prepare_decode,
  prepare_steps,
  token_batches,
)
from llmjax.bench.workers import Spec


def train(spec: Spec, compiled: bool = False):
  """Prepares `LlamaForCausalLM` as it is, or under `torch.compile`."""
  model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.float32)
  model.config.use_cache = False

  def score(ids):
    return model(input_ids=ids).logits

  return prepare_step(spec, model, torch.compile(score) if compiled else score)


train_compiled = functools.partial(train, compiled=True)


def prepare_step(spec: Spec, model, score):
  """Makes a peer of training out of a torch module.

  Args:
    model: holds the weights, in fp32.
    score: ids [b, t] → logits [b, t, v].
  Returns:
    (facts, measure), as `Peer.where` wants them.
  """
  torch.set_num_threads(spec.cores)
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
  size = SIZES[spec.size]
  feed = itertools.cycle(torch.from_numpy(rows).long() for rows in token_batches(size))

  def run_step() -> float:
    rows = next(feed)
    with torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "bfloat16"):
      logits = score(rows[:, :-1])
    loss = cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()

  return prepare_steps(size, run_step)


def decode(spec: Spec, **options):
  """Prepares `generate` with the cache that it has by default, or with `options` of its own."""
  torch.set_num_threads(spec.cores)
  model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=getattr(torch, spec.dtype))
  model.eval()

  @torch.inference_mode()
  def run(rows, new_tokens: int) -> list[list[int]]:
    ids = torch.tensor(rows)
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, do_sample=False, **lengths, **options)
    return made[:, ids.shape[1] :].tolist()

  return prepare_decode(SIZES[spec.size], run)


decode_static = functools.partial(decode, cache_implementation="static")


def train_litgpt(spec: Spec):
  """Prepares litgpt's `GPT` of the same architecture, with the same weights."""
  from litgpt.config import Config
  from litgpt.model import GPT
  from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
  from safetensors.torch import load_file

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
