"""Llama 2 7B on 64 chips of v5e: 4 rows of 2,048 tokens a chip.

  llmjax plan --config=experiments/llama2_7b.py --topology=v5e:8x8
  llmjax train --config=experiments/llama2_7b.py --workdir=runs/llama2 --config.data.sources=FOLDER

`plan` and `check` need no file. A run wants `tokenizer.model` of
huggingface.co/meta-llama/Llama-2-7b where `tokenizer.path` says. Rates and tokens are those of
Touvron et al. 2023, arXiv:2307.09288, sec. 2.2; rows and batch are those of the comparison in
docs/plan-accuracy.md, where theirs were 1,024 × 4,096.

The compiler's estimate: 14.5 of 16 GiB, 2.56 s a step of which 0.19 wait for links, 67 % MFU, 104
dollars a billion tokens at the list price. With remat full, chunks of 128 and fast memory as by
default 5.3 GiB, 2.93 s, and a third of the time to compile.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config


def get_config():
  """Returns the config of 64 chips with 16 GiB each."""
  config = defaults(Config)
  config.model = editable(preset("Llama-2-7B"))
  config.model.max_seq_len = 2048
  config.data.batch_size = 256
  config.tokenizer.path = "tokenizers/llama2/tokenizer.model"

  # What `--search` found. 12 bytes of state a weight: 1.3 GB a chip; keys, values and gates of all
  # layers are 10 more; all that projections leave would be 20.
  config.mesh.data = 1
  config.mesh.fsdp = 64
  config.model.remat = "key+value+gate"
  config.loss.chunk = 2048

  config.train.steps = 2_000_000_000_000 // (256 * 2048)
  config.optim.learning_rate = 3e-4
  config.optim.warmup = 2000
  config.optim.eps = 1e-5
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, 7 % faster
  return config
