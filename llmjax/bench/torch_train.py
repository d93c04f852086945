"""transformers as a peer of training, eager and compiled; the torch step that litgpt shares.

All do the same step: forward, mean cross-entropy in fp32, backward, AdamW (the fused one, torch's
fastest); bf16 means autocast over fp32 weights.
"""

import itertools

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from llmjax.bench.peers import Spec
from llmjax.bench.sizes import (
  BETAS,
  EPS,
  LEARNING_RATE,
  SIZES,
  WEIGHT_DECAY,
  token_batches,
)
from llmjax.bench.timing import timed_steps


def transformers_eager(spec: Spec):
  """Prepares `LlamaForCausalLM` as it is."""
  return prepare_step(spec, _transformers(spec))


def transformers_compile(spec: Spec):
  """Prepares `LlamaForCausalLM` under `torch.compile`."""
  return prepare_step(spec, torch.compile(_transformers(spec)))


def _transformers(spec: Spec):
  model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.float32)
  model.config.use_cache = False
  return _Logits(model)


class _Logits(torch.nn.Module):
  """Makes a Hugging Face model a function of ids that returns logits."""

  def __init__(self, model):
    super().__init__()
    self.model = model

  def forward(self, ids):
    """Scores: logits [b, t, v]."""
    return self.model(input_ids=ids).logits


def prepare_step(spec: Spec, model):
  """Makes a peer of training out of a torch module.

  Args:
    spec: size, dtype and threads.
    model: ids [b, t] → logits [b, t, v], with fp32 weights.
  Returns:
    (facts, measure), as `Peer.where` wants them.
  """
  torch.set_num_threads(spec.cores)
  model.train()
  rate = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
  optimizer = torch.optim.AdamW(model.parameters(), fused=True, **rate)
  feed = itertools.cycle(torch.from_numpy(rows).long() for rows in token_batches(SIZES[spec.size]))

  def run_step() -> float:
    rows = next(feed)
    with torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "bfloat16"):
      logits = model(rows[:, :-1])
    loss = cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()

  first_loss = run_step()
  size = SIZES[spec.size]
  tokens = size.batch_size * size.length
  return {"first_loss": first_loss}, lambda request: timed_steps(
    run_step, tokens, request["seconds"]
  )
