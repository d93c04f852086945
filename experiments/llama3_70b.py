"""Llama 3 70B on 512 chips of v5p: 2 rows of 8,192 tokens a chip.

  llmjax plan --config=experiments/llama3_70b.py --topology=v5p:8x8x8
  llmjax train --config=experiments/llama3_70b.py --workdir=runs/llama70 \\
    --config.data.sources=FOLDER

`plan` and `check` need no file. A run wants `original/tokenizer.model` (a tiktoken rank file) of
huggingface.co/meta-llama/Meta-Llama-3-70B where `tokenizer.path` says. Rate, warm-up and the 15 T
tokens are those of Grattafiori et al. 2024, arXiv:2407.21783, table 3 and sec. 3.4.

The compiler's estimate: 58 of 95 GiB, 23.3 s a step of which 3.9 wait for links, 69 % MFU, 1,657
dollars a billion tokens at the list price.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config

ROWS = 1024  # 8.4 million tokens


def get_config():
  """Returns the config of 512 chips with 95 GiB each."""
  config = defaults(Config)
  config.model = editable(preset("Llama-3-70B"))
  # What `--search` found: four micro-batches, each of which leaves room for all that projections
  # and attention made. Weights are gathered for each, 514 GiB a step, of half a layer's width.
  config.mesh.data = 1
  config.mesh.fsdp = 256
  config.mesh.tensor = 2
  config.train.grad_accum_steps = 4
  config.model.remat = "save_projections"
  config.model.attention.block = 256

  config.data.batch_size = ROWS
  config.tokenizer.kind = "tiktoken"
  config.tokenizer.path = "tokenizers/llama3/tokenizer.model"
  config.train.steps = 15_000_000_000_000 // (ROWS * config.model.max_seq_len)
  config.optim.warmup = 8000
  config.optim.learning_rate = 1.5e-4
  config.optim.min_lr_ratio = 0.01
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, 4 % faster
  config.loss.chunk = 2048  # its gradient of the head is added up fewer times
  return config
