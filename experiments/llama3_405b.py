"""Llama 3.1 405B on 2,048 chips of v5p: a row of 8,192 tokens a chip.

  llmjax plan --config=experiments/llama3_405b.py --topology=v5p:8x16x16
  llmjax train --config=experiments/llama3_405b.py --workdir=runs/llama405 \\
    --config.data.sources=FOLDER

`plan` and `check` need no file. A run wants `tokenizer.model` (a tiktoken rank file, below
`original/`) of huggingface.co/meta-llama/Llama-3.1-405B where `tokenizer.path` says. Rates, rows of
8,192, 16 M tokens a step and 15.6 T in all are those of Grattafiori et al. 2024, arXiv:2407.21783,
sec. 3.4.1; there is no Llama 3 of this size before 3.1, whose stretch of rope the preset has.

The compiler's estimate: 83 of 95 GiB, 69 s a step of which 17.4 wait for links, 65 % MFU, 9,838
dollars a billion tokens at the list price.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config


def get_config():
  """Returns the config of 2,048 chips with 95 GiB each."""
  config = defaults(Config)
  config.model = editable(preset("Llama-3-405B"))
  config.model.max_seq_len = 8192
  config.data.batch_size = 2048
  config.train.steps = 15_600_000_000_000 // (2048 * 8192)

  # What `--search` found: of four micro-batches each leaves room for all that projections and
  # attention made. 2.4 GB of state a chip; cut over fsdp alone, weights would be four times as long
  # on the links.
  config.mesh.data = 1
  config.mesh.fsdp = 512
  config.mesh.tensor = 4
  config.train.grad_accum_steps = 4
  config.model.remat = "save_projections"
  config.model.attention.block = 256

  config.tokenizer.kind = "tiktoken"
  config.tokenizer.path = "tokenizers/llama3/tokenizer.model"
  config.optim.learning_rate = 8e-5
  config.optim.warmup = 8000
  config.optim.min_lr_ratio = 0.01
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, 3 % faster
  config.loss.chunk = 2048  # its gradient of the head is added up fewer times
  return config
