"""Quickstart: a small Llama on the text of Python's own standard library, on two CPU cores.

  llmjax train --config=experiments/quickstart.py --workdir=runs/quickstart

or `make train`. Expected on two cores: about five minutes, and held-out bits per byte near 1.72,
below both gzip -9 (2.07) and xz -9 (1.80) on the same bytes. The corpus is that of the interpreter
that runs it, so another Python gives slightly other figures.
"""

from llmjax.core.config import defaults
from llmjax.training.config import Config


def get_config():
  """Returns the config that `make train` runs."""
  config = defaults(Config)
  config.tokenizer.vocab_size = 4096
  config.data.sources = "stdlib"
  config.data.batch_size = 8

  config.model.layers = 4
  config.model.width = 192
  config.model.heads = 3
  config.model.kv_heads = 1
  config.model.mlp_width = 512
  config.model.max_seq_len = 256
  config.model.dtype = "float32"  # on CPU as fast as bfloat16
  config.model.scan = False  # on CPU unrolled layers run faster

  # Muon needs about half the tokens that AdamW does here: see docs/LOG.md.
  config.optim.kind = "muon"
  config.optim.matrix_learning_rate = 0.03
  config.optim.learning_rate = 1.6e-2
  config.optim.warmup = 0.096  # of the steps
  config.optim.min_lr_ratio = 0.02
  config.train.steps = 520
  config.checkpoint.every = 100

  config.eval.stride = 192
  config.sample.prompts = ("def read_config(path):\n", "class Queue:\n", "This module provides ")
  return config
