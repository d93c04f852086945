"""Llama 3 8B on 64 chips of v5p: 4 rows of 8,192 tokens a chip.

  llmjax plan --config=experiments/llama3_8b.py --topology=v5p:4x4x4
  llmjax train --config=experiments/llama3_8b.py --workdir=runs/llama3 --config.data.sources=FOLDER

`plan` and `check` need no file. A run wants `original/tokenizer.model` (a tiktoken rank file) of
huggingface.co/meta-llama/Meta-Llama-3-8B where `tokenizer.path` says. Rate, warm-up and the 15 T
tokens are those of Grattafiori et al. 2024, arXiv:2407.21783, table 3 and sec. 3.4.

The compiler's estimate: 91.4 of 95 GiB, 4.86 s a step of which 0.26 wait for links, 76 % MFU, 173
dollars a billion tokens at the list price. With remat full and fast memory as by default 16.2 GiB
and 5.73 s.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config


def get_config():
  """Returns the config of 64 chips with 95 GiB each."""
  config = defaults(Config)
  config.tokenizer.kind = "tiktoken"
  config.tokenizer.path = "tokenizers/llama3/tokenizer.model"
  config.model = editable(preset("Llama-3-8B"))
  config.data.batch_size = 256  # 2.1 million tokens

  # What `--search` found. 1.5 GB of state a chip; the stream between layers is 8.6 GB, all that
  # projections and attention leave 82 more.
  config.model.remat = "save_projections"
  config.model.attention.block = 256
  config.mesh.data = 1
  config.mesh.fsdp = 64

  config.optim.learning_rate = 3e-4
  config.optim.warmup = 8000
  config.optim.min_lr_ratio = 0.01
  config.train.steps = 15_000_000_000_000 // (256 * 8192)
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, 3 % faster
  config.loss.chunk = 1024  # its gradient of the head is added up fewer times
  return config
