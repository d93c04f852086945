"""From scores to a token: temperature, top-k, nucleus."""

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.core.choices import check_finite
from llmjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: divides the scores; 0 takes the highest.
    top_k: keeps the k highest, with all that equal the last of them; 0 keeps all.
    top_p: keeps the fewest whose probabilities reach p, after top-k; 1 keeps all.
    max_tokens: most new tokens.
    seed: of the draw; seed, model, prompt and its place in the batch decide the text, so equal
      prompts in one batch differ.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  max_tokens: int = 128
  seed: int = 0

  def __post_init__(self):
    check_finite("", self)
    for name in ("temperature", "top_k", "seed"):
      if getattr(self, name) < 0:
        raise UserError(f"{name} {getattr(self, name)} is negative")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p {self.top_p} is not in (0, 1]")
    if self.max_tokens < 1:
      raise UserError(f"max_tokens {self.max_tokens} is less than 1")


def filter_logits(logits_bv, temperature, top_k: int, top_p):
  """Scales scores by the temperature and puts those outside top-k and nucleus at -inf.

  Args:
    logits_bv: fp32 scores.
    temperature: > 0.
    top_k: 0 keeps all.
    top_p: in (0, 1]; the highest score always stays.
  Returns:
    logits_bv, fp32; their softmax is the distribution that is drawn from.
  Source: nucleus: Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1.
  """
  logits_bv = logits_bv / temperature
  ordered_bv = jnp.sort(logits_bv, axis=-1, descending=True)
  if top_k:
    ordered_bv = jnp.where(jnp.arange(ordered_bv.shape[-1]) < top_k, ordered_bv, -jnp.inf)
  probabilities = jax.nn.softmax(ordered_bv, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  inside = (before < top_p) | (top_p >= 1)  # rounding can bring the sum to 1 before the last one
  kept = jnp.where(inside & jnp.isfinite(ordered_bv), ordered_bv, jnp.inf)
  return jnp.where(logits_bv >= kept.min(-1, keepdims=True), logits_bv, -jnp.inf)


def draw(key, logits_bv, temperature, top_k: int, top_p):
  """Draws one token a row; at temperature 0 the highest score.

  Args:
    logits_bv: fp32 scores.
    temperature: ≥ 0, may be traced.
    top_k: static.
    top_p: may be traced.
  Returns:
    int32 [b].
  """
  greedy = lambda: jnp.argmax(logits_bv, axis=-1)  # noqa: E731

  def drawn():
    return jax.random.categorical(key, filter_logits(logits_bv, temperature, top_k, top_p), axis=-1)

  return jax.lax.cond(temperature > 0, drawn, greedy).astype(jnp.int32)
