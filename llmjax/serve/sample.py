"""From scores to a token: repetition penalty, temperature, top-k, nucleus, min-p, row by row."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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
    seed: of the draws; see `generate` for what else they depend on.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
  """`Sampling` of every row of a batch, as arrays.

  Attributes:
    temperature_b: fp32; likewise `top_p_b`, `min_p_b` and `penalty_b`.
    top_k_b: int32.
    key_b: PRNG keys; the token at position p is drawn with `fold_in(key, p)`.
    ends_bn: int32 ids that end a row; -1 fills up.
  """

  temperature_b: jax.Array
  top_k_b: jax.Array
  top_p_b: jax.Array
  min_p_b: jax.Array
  penalty_b: jax.Array
  key_b: jax.Array
  ends_bn: jax.Array

  @classmethod
  def of(
    cls, samplings: Sequence[Sampling], ends: Sequence[Sequence[int]], salts=None
  ) -> "RowSampling":
    """Makes the arrays of rows.

    Args:
      samplings: of every row.
      ends: of every row the ids that end it.
      salts: of every row a sequence of numbers below 2³² that its key depends on besides its seed.
    """
    column = lambda name, dtype: np.array([getattr(s, name) for s in samplings], dtype)  # noqa: E731
    floats = [column(name, np.float32) for name in ("top_p", "min_p", "repetition_penalty")]
    ends_bn = np.full((len(ends), max(map(len, ends), default=0)), -1, np.int32)
    for row, ids in zip(ends_bn, ends, strict=True):
      row[: len(ids)] = ids
    seed_b = np.array([s.seed % 2**32 for s in samplings], np.uint32)
    salt_bn = np.array(salts or [()] * len(samplings), np.uint32).reshape(len(samplings), -1)
    temperature_b, top_k_b = column("temperature", np.float32), column("top_k", np.int32)
    return cls(temperature_b, top_k_b, *floats, _keys(seed_b, salt_bn), ends_bn)


@jax.jit
@jax.vmap
def _keys(seed, salt_n):
  key = jax.random.key(seed)
  for n in range(len(salt_n)):
    key = jax.random.fold_in(key, salt_n[n])
  return key


def penalize(logits_bv, seen_bv, penalty_b):
  """Lowers the scores of tokens that were seen: divided where positive, multiplied where not.

  Source: Keskar et al. 2019, arXiv:1909.05858, sec. 4.1, as transformers applies it.
  """
  penalty_b1 = penalty_b[:, None]
  lower_bv = jnp.where(logits_bv < 0, logits_bv * penalty_b1, logits_bv / penalty_b1)
  return jnp.where(seen_bv, lower_bv, logits_bv)


def filter_logits(logits_bv, rows: RowSampling):
  """Scales scores by the temperature and puts those outside top-k, nucleus and min-p at -inf.

  Args:
    logits_bv: fp32 scores.
    rows: of every row the temperature (0 counts as 1), top-k, top-p and min-p; the highest score
      always stays.
  Returns:
    logits_bv, fp32; their softmax is the distribution that is drawn from.
  Source: nucleus: Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1; min-p: Nguyen et al. 2024,
    arXiv:2407.01082, sec. 3.
  """
  logits_bv /= jnp.where(rows.temperature_b > 0, rows.temperature_b, 1)[:, None]

  def kept_bv():
    v = logits_bv.shape[-1]
    ordered_bv = jnp.sort(logits_bv, axis=-1, descending=True)
    top_k_b1 = jnp.where(rows.top_k_b > 0, rows.top_k_b, v)[:, None]
    ordered_bv = jnp.where(jnp.arange(v) < top_k_b1, ordered_bv, -jnp.inf)
    probabilities = jax.nn.softmax(ordered_bv, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p_b1 = rows.top_p_b[:, None]
    inside = (before < top_p_b1) | (top_p_b1 >= 1)  # the sum may round to 1 before the last one
    kept = jnp.where(inside & jnp.isfinite(ordered_bv), ordered_bv, jnp.inf)
    least_b1 = ordered_bv[:, :1] + jnp.log(rows.min_p_b)[:, None]
    least_b1 = jnp.maximum(kept.min(-1, keepdims=True), least_b1)
    return jnp.where(logits_bv >= least_b1, logits_bv, -jnp.inf)

  filters = (rows.top_k_b > 0) | (rows.top_p_b < 1) | (rows.min_p_b > 0)
  return jax.lax.cond(jnp.any(filters), kept_bv, lambda: logits_bv)


def draw(logits_bv, rows: RowSampling, positions_b):
  """Draws one token of every row; at temperature 0 the one of the highest score.

  Args:
    logits_bv: fp32 scores.
    rows: how.
    positions_b: int32 position of the token in its row, which its random numbers depend on.
  Returns:
    int32 [b].
  """
  greedy_b = jnp.argmax(logits_bv, axis=-1)

  def drawn_b():
    key_b = jax.vmap(jax.random.fold_in)(rows.key_b, positions_b)
    token_b = jax.vmap(jax.random.categorical)(key_b, filter_logits(logits_bv, rows))
    return jnp.where(rows.temperature_b > 0, token_b, greedy_b)

  return jax.lax.cond(jnp.any(rows.temperature_b > 0), drawn_b, lambda: greedy_b).astype(jnp.int32)
