"""Mixtral 8x7B on 64 chips of v5p: 4 rows of 4,096 tokens a chip.

  llmjax plan --config=experiments/mixtral_8x7b.py --topology=v5p:4x4x4
  llmjax train --config=experiments/mixtral_8x7b.py --workdir=runs/mixtral \\
    --config.data.sources=FOLDER

`plan` and `check` need no file. A run wants `tokenizer.model` of
huggingface.co/mistralai/Mixtral-8x7B-v0.1 where `tokenizer.path` says. Jiang et al. 2024,
arXiv:2401.04088, give no rates: the weight of the balance is that of their `config.json`, the rest
is Llama 2's, over a trillion tokens.

The compiler's estimate: 23 of 95 GiB, 6.1 s a step of which 1.1 wait for links, 47 % MFU, 433
dollars a billion tokens at the list price. `--search` finds nothing faster.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config

LENGTH = 4096


def get_config():
  """Returns the config of 64 chips with 95 GiB each."""
  config = defaults(Config)
  config.model = editable(preset("Mixtral-8x7B"))
  config.model.max_seq_len = LENGTH
  config.data.batch_size = 256
  config.loss.moe_aux = 0.02

  # Experts' width cut in two halves what each chip gathers, and takes no more memory. Experts on
  # chips of their own would send less still, with room for all rows on each, twice the memory.
  config.mesh.data = 1
  config.mesh.fsdp = 32
  config.mesh.tensor = 2
  config.model.remat = "full"

  config.tokenizer.path = "tokenizers/mixtral/tokenizer.model"
  config.optim.learning_rate = 3e-4
  config.optim.warmup = 2000
  config.train.steps = 1_000_000_000_000 // (256 * LENGTH)
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, 1 % faster
  return config
