"""From scores to a token: repetition penalty, temperature, top-k, nucleus, min-p, row by row."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.choices import check_fields, check_finite
from llmjax.core.errors import UserError
from llmjax.parallel.rules import shard


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

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  max_tokens: int = 128
  seed: int = 0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  stop: Sequence[str] = ()

  def __post_init__(self):
    check_finite("", self)
    check_fields(
      "", self, temperature=0, top_k=0, seed=0, top_p="(0, 1]", max_tokens=1, min_p="[0, 1]",
      repetition_penalty="positive",
    )
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
    scores_bv = shard(logits_bv, "b1")
    top_k_b = jnp.where(rows.top_k_b > 0, rows.top_k_b, jnp.inf)
    least_b1 = _least_kept(scores_bv, jnp.ones_like(scores_bv), top_k_b)
    chances_bv = jax.nn.softmax(jnp.where(scores_bv >= least_b1, scores_bv, -jnp.inf), axis=1)
    top_p_b = jnp.where(rows.top_p_b < 1, rows.top_p_b, jnp.inf)
    nucleus_b1 = _least_kept(scores_bv, chances_bv, top_p_b)
    likely_b1 = scores_bv.max(axis=1, keepdims=True) + jnp.log(rows.min_p_b)[:, None]
    least_b1 = jnp.maximum(jnp.maximum(least_b1, nucleus_b1), likely_b1)
    return jnp.where(scores_bv >= least_b1, scores_bv, -jnp.inf)

  filters = (rows.top_k_b > 0) | (rows.top_p_b < 1) | (rows.min_p_b > 0)
  return jax.lax.cond(jnp.any(filters), kept_bv, lambda: logits_bv)


def _least_kept(scores_bv, weights_bv, limit_b):
  """The lowest score [b, 1] such that all tokens that score higher weigh less than a limit.

  Found by bisection, where sorting takes ten times as long. Weights are fp32, the counts of top-k
  too: XLA's CPU backend adds integers up several times as slowly.
  """

  def reorder(bits):  # integers in the order of the floats with these bits; its own inverse
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)

  def bits(scores):
    return jax.lax.bitcast_convert_type(scores, jnp.int32)

  keys_bv = reorder(bits(scores_bv))

  def halve(_, bounds):
    low_b, high_b = bounds
    middle_b = (low_b >> 1) + (high_b >> 1) + (low_b & high_b & 1)
    kept_b = jnp.where(keys_bv > middle_b[:, None], weights_bv, 0).sum(axis=1) < limit_b
    return jnp.where(kept_b, low_b, middle_b + 1), jnp.where(kept_b, middle_b, high_b)

  high_b = keys_bv.max(axis=1)
  low_b = jnp.full_like(high_b, reorder(bits(jnp.float32(-jnp.inf))))
  _, least_b = jax.lax.fori_loop(0, 32, halve, (low_b, high_b))
  return jax.lax.bitcast_convert_type(reorder(least_b), jnp.float32)[:, None]


def draw(logits_bv, rows: RowSampling, positions_b):
  """Draws one token of every row; at temperature 0 the one of the highest score.

  Args:
    logits_bv: fp32 scores.
    rows: how.
    positions_b: int32 position of the token in its row, which its random numbers depend on.
  Returns:
    int32 [b].
  """

  def noisy_bv():
    """Scores whose maximum is a draw: with Gumbel noise where the temperature is above zero."""
    key_b = jax.vmap(jax.random.fold_in)(rows.key_b, positions_b)
    noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, logits_bv.shape[1:]))(key_b)
    noise_bv = jax.lax.optimization_barrier(noise_bv)  # else computed at every use, on CPU
    is_greedy_b1 = rows.temperature_b[:, None] == 0
    return jnp.where(is_greedy_b1, logits_bv, filter_logits(logits_bv, rows) + noise_bv)

  scores_bv = jax.lax.cond(jnp.any(rows.temperature_b > 0), noisy_bv, lambda: logits_bv)
  # On CPU argmax, one reduction over pairs, takes several times as long as these two.
  v = logits_bv.shape[1]
  is_best_bv = scores_bv == scores_bv.max(axis=1, keepdims=True)
  return jnp.minimum(jnp.where(is_best_bv, jnp.arange(v, dtype=jnp.int32), v).min(axis=1), v - 1)
