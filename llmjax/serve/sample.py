"""From scores to a token: repetition penalty, temperature, top-k, nucleus, min-p."""

import dataclasses
from collections.abc import Sequence

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
    min_p: keeps tokens of at least so much of the likeliest one's probability; 0 keeps all.
    repetition_penalty: divides the positive scores of tokens that prompt and text hold already, and
      multiplies their negative ones; 1 leaves them.
    stop: texts that end what is written; it is cut before them.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  max_tokens: int = 128
  seed: int = 0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  stop: Sequence[str] = ()

  def __post_init__(self):
    check_finite("", self)
    for name in ("temperature", "top_k", "seed"):
      if getattr(self, name) < 0:
        raise UserError(f"{name} {getattr(self, name)} is negative")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p {self.top_p} is not in (0, 1]")
    if self.max_tokens < 1:
      raise UserError(f"max_tokens {self.max_tokens} is less than 1")
    if not 0 <= self.min_p <= 1:
      raise UserError(f"min_p {self.min_p} is not in [0, 1]")
    if self.repetition_penalty <= 0:
      raise UserError(f"repetition_penalty {self.repetition_penalty} is not positive")
    if isinstance(self.stop, str) or not all(self.stop):
      raise UserError(f"stop {self.stop!r} is not a sequence of texts, none of them empty")


def penalize(logits_bv, seen_bv, penalty):
  """Lowers the scores of tokens that were seen: divided where positive, multiplied where not.

  Source: Keskar et al. 2019, arXiv:1909.05858, sec. 4.1, as transformers applies it.
  """
  lower_bv = jnp.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
  return jnp.where(seen_bv, lower_bv, logits_bv)


def filter_logits(logits_bv, temperature, top_k: int, top_p, min_p=0.0):
  """Scales scores by the temperature and puts those outside top-k, nucleus and min-p at -inf.

  Args:
    logits_bv: fp32 scores.
    temperature: > 0.
    top_k: 0 keeps all.
    top_p: in (0, 1]; the highest score always stays.
    min_p: in [0, 1], a share of the highest probability.
  Returns:
    logits_bv, fp32; their softmax is the distribution that is drawn from.
  Source: nucleus: Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1; min-p: Nguyen et al. 2024,
    arXiv:2407.01082, sec. 3.
  """
  logits_bv = logits_bv / temperature
  ordered_bv = jnp.sort(logits_bv, axis=-1, descending=True)
  if top_k:
    ordered_bv = jnp.where(jnp.arange(ordered_bv.shape[-1]) < top_k, ordered_bv, -jnp.inf)
  probabilities = jax.nn.softmax(ordered_bv, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  inside = (before < top_p) | (top_p >= 1)  # rounding can bring the sum to 1 before the last one
  kept = jnp.where(inside & jnp.isfinite(ordered_bv), ordered_bv, jnp.inf)
  least = jnp.maximum(kept.min(-1, keepdims=True), ordered_bv[..., :1] + jnp.log(min_p))
  return jnp.where(logits_bv >= least, logits_bv, -jnp.inf)


def draw(key, logits_bv, temperature, top_k: int, top_p, min_p=0.0):
  """Draws one token a row; at temperature 0 the highest score.

  Args:
    logits_bv: fp32 scores.
    temperature: ≥ 0, may be traced.
    top_k: static.
    top_p: may be traced; likewise min_p.
  Returns:
    int32 [b].
  """
  greedy = lambda: jnp.argmax(logits_bv, axis=-1)  # noqa: E731

  def drawn():
    kept_bv = filter_logits(logits_bv, temperature, top_k, top_p, min_p)
    return jax.random.categorical(key, kept_bv, axis=-1)

  return jax.lax.cond(temperature > 0, drawn, greedy).astype(jnp.int32)
