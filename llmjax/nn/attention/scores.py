"""Terms of attention scores: scale, soft cap, sinks, and position biases (ALiBi's slopes, T5's
learned table)."""


import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.parallel.rules import shard


def alibi_slopes(heads: int) -> np.ndarray:
  """Computes each head's slope: 2^(-8i/n) for i = 1 … n where n is a power of two.

  Otherwise the slopes of the next lower power of two, then every other one of the next higher.

  Source: Press et al. 2021, arXiv:2108.12409, sec. 3, and the authors' released code.
  """
  power = 2 ** math.floor(math.log2(heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  more = [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
  return np.array(slopes + more)


def relative_bucket(distance, buckets: int, max_distance: int, both_ways: bool):
  """Sorts distances into buckets: exact ones when near, logarithmic when far.

  Args:
    distance: int32, key position minus query position, any shape.
    max_distance: all distances from here on share the last bucket.
    both_ways: half of the buckets are for keys after the query; else those share bucket 0.
  Returns:
    int32 in [0, buckets), shape of `distance`.
  Source: Raffel et al. 2019, arXiv:1910.10683, sec. 2.1, and the authors' released code.
  """
  base = 0
  if both_ways:
    buckets //= 2
    base = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = buckets // 2
  ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
  far = exact + (
    jnp.log(ratio) / math.log(max_distance / exact) * (buckets - exact)
  ).astype(jnp.int32)
  return base + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
  """A bias that is added to attention's scores by distance.

  Attributes:
    slopes_n: fp32; the bias is -slope · distance. None for a table.
    relative_in: fp32 table [buckets, n], with `max_distance` and `both_ways`. None for slopes.
  """

  slopes_n: jax.Array | None = None
  relative_in: jax.Array | None = None
  max_distance: int = dataclasses.field(default=0, metadata={"static": True})
  both_ways: bool = dataclasses.field(default=False, metadata={"static": True})

  def scores(self, q_positions_bt, k_positions_bs):
    """Computes bias_bnts, fp32, for queries and keys at these positions."""
    distance_bts = k_positions_bs[:, None, :] - q_positions_bt[:, :, None]
    if self.slopes_n is not None:
      return -self.slopes_n[:, None, None] * jnp.abs(distance_bts)[:, None].astype(jnp.float32)
    bucket_bts = relative_bucket(
      distance_bts, len(self.relative_in), self.max_distance, self.both_ways
    )
    table_in = shard(self.relative_in, "ig")  # small: replicated
    return jnp.moveaxis(jnp.take(table_in, bucket_bts, axis=0), -1, 1)


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
