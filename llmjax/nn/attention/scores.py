"""Scale, soft cap, bias and sinks of attention scores."""

import dataclasses

import jax

from llmjax.nn.bias import Bias


@dataclasses.dataclass(frozen=True)
class Scores:
  """Terms of attention scores.

  Attributes:
    scale: factor on q kᵀ.
    softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
    bias: added by distance, or None.
    sinks_n: fp32 score of one more key that has no value, or None.
  """

  scale: float
  softcap: float = 0.0
  bias: Bias | None = None
  sinks_n: jax.Array | None = None
