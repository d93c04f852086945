"""llmjax: one Python config becomes a proven run of a large language model."""

from llmjax.core.config import defaults
from llmjax.core.errors import UserError
from llmjax.models.model import Model
from llmjax.run import evaluate, load, train
from llmjax.serve.generate import generate
from llmjax.serve.sample import Sampling
from llmjax.train.config import Config

__all__ = [
  "Config",
  "Model",
  "Sampling",
  "UserError",
  "defaults",
  "evaluate",
  "generate",
  "load",
  "train",
]
