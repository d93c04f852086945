"""Shrunk runs for the end-to-end tests: a folder of made-up text and a config of a few seconds."""

import random
from pathlib import Path

from llmjax.core.config import defaults, freeze
from llmjax.training.config import Config


def write_text(folder: Path, files: int = 12, words: int = 250) -> Path:
  """Writes text files of made-up sentences, the same ones every time."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(0)
  syllables = ["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "é", "der", "ing", "st"]
  lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
  for number in range(files):
    text = " ".join(rng.choices(lexicon, k=words))
    (folder / f"{number:02}.txt").write_text(text.replace(" ka", ".\n  ka"))
  return folder


def tiny_values(sources: Path, steps: int = 12):
  """The editable config of a run of a few seconds."""
  config = defaults(Config)
  config.model.layers = 2
  config.model.width = 32
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.mlp_width = 64
  config.model.max_seq_len = 32
  config.model.dtype = "float32"
  config.tokenizer.vocab_size = 400
  config.data.sources = str(sources)
  config.data.held_out = 0.2
  config.data.batch_size = 8
  config.optim.learning_rate = 1e-2
  config.optim.warmup = min(4, steps - 1)
  config.train.steps = steps
  config.checkpoint.every = 4
  config.sample.max_tokens = 8
  return config


def tiny(sources: Path, steps: int = 12, **changes) -> Config:
  """The frozen config of a run of a few seconds; `changes` are `section__key=value`."""
  values = tiny_values(sources, steps)
  for name, value in changes.items():
    section, key = name.split("__")
    values[section][key] = value
  return freeze(values.to_dict(), Config)
