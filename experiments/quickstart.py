"""Quickstart: a small Llama on the standard library's own text, on two CPU cores.

  llmjax train --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from llmjax.core.config import defaults
from llmjax.train.config import Config


def get_config():
  """The config that `make train` runs."""
  config = defaults(Config)
  config.model.layers = 4
  config.model.width = 256
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.mlp_width = 768
  config.model.context = 256
  config.model.scan = False
  config.tokenizer.vocab_size = 4096
  config.data.batch_size = 8
  config.optim.learning_rate = 3e-3
  config.train.steps = 60
  config.sample.prompts = ("def main(", "class ", "The ")
  return config
