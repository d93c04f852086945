"""How attention makes scores of queries and keys, beyond their product."""

import dataclasses

import jax

from llmjax.nn.bias import Bias


@dataclasses.dataclass(frozen=True)
class Scores:
  """How scores are made of q and k, beyond their product.

  Attributes:
    scale: factor on q kᵀ.
    softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
    bias: added by distance; None adds nothing.
    sinks_n: fp32 score of one more key that has no value; None for none.
  """

  scale: float
  softcap: float = 0.0
  bias: Bias | None = None
  sinks_n: jax.Array | None = None
