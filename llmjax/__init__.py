"""llmjax: one Python config becomes a proven run of a large language model."""

import llmjax.core.interrupt  # noqa: F401  first, for Ctrl-C while all else is imported
from llmjax.convert import convert
from llmjax.core.config import defaults
from llmjax.core.errors import UserError
from llmjax.core.memory import tune_allocator
from llmjax.core.platform import spare_libtpu
from llmjax.data_show import data_show
from llmjax.model import Model
from llmjax.planning.plan import plan
from llmjax.run import count_parameters, evaluate, load, train
from llmjax.serve.embed import embed
from llmjax.serve.generate import Completion, generate, stream
from llmjax.serve.sample import Sampling
from llmjax.training.config import Config

__all__ = [
  "Completion",
  "Config",
  "Model",
  "Sampling",
  "UserError",
  "convert",
  "count_parameters",
  "data_show",
  "defaults",
  "embed",
  "evaluate",
  "generate",
  "load",
  "plan",
  "stream",
  "train",
]

tune_allocator()
spare_libtpu()
