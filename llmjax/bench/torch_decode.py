"""transformers as a peer of decoding, with its growing cache and with its static one."""

import torch
from transformers import AutoModelForCausalLM

from llmjax.bench.peers import Spec
from llmjax.bench.sizes import SIZES
from llmjax.bench.timing import prepare_decode


def dynamic_cache(spec: Spec):
  """Prepares `generate` as it is by default."""
  return _prepare(spec)


def static_cache(spec: Spec):
  """Prepares `generate` with a cache of fixed length."""
  return _prepare(spec, cache_implementation="static")


def _prepare(spec: Spec, **options):
  torch.set_num_threads(spec.cores)
  model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=getattr(torch, spec.dtype))
  model.eval()

  @torch.inference_mode()
  def run(rows, new_tokens: int) -> list[list[int]]:
    ids = torch.tensor(rows)
    made = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      min_new_tokens=new_tokens,
      max_new_tokens=new_tokens,
      **options,
    )
    return made[:, ids.shape[1] :].tolist()

  return prepare_decode(SIZES[spec.size], run)
