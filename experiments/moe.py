"""Eight experts, two for each token, against a dense model of as many active parameters.

  llmjax train --config=experiments/moe.py --workdir=runs/moe
  llmjax train --config=experiments/moe.py --workdir=runs/moe-unbalanced --config.loss.moe_aux=0
  llmjax train --config=experiments/moe.py --workdir=runs/moe-dense \\
    --config.model.moe.experts=0 --config.model.moe.width=0 --config.model.mlp_width=512

Each reads the standard library's text, as the quickstart does, for the same steps on the same
batches. Expected: 2.01 bits a byte held out against 2.04 of the dense model, and a largest load of
1.3 of the mean (`moe_max_load` in result.json, `experts.png`). Without balancing it is 2.5, experts
starve, and the dense model is as good. docs/moe.md shows the three side by side.
"""

from llmjax.core.config import defaults
from llmjax.training.config import Config


def get_config():
  """Returns the config of the model with experts."""
  config = defaults(Config)
  config.tokenizer.vocab_size = 4096
  config.data.sources = "stdlib"
  config.data.batch_size = 8

  config.model.layers = 4
  config.model.width = 128
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.moe.experts = 8
  config.model.moe.top_k = 2
  config.model.moe.width = 256
  config.model.max_seq_len = 256
  config.model.dtype = "float32"
  config.model.scan = False
  config.loss.moe_aux = 0.01

  config.optim.learning_rate = 4e-3
  config.optim.warmup = 0.1  # of the steps
  config.optim.min_lr_ratio = 0.05
  config.train.steps = 500
  config.checkpoint.every = 250
  config.eval.stride = 192
  return config
