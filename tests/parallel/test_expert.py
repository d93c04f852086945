"""Proves that rows which are of no expert never reach a token or a gradient, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from llmjax.parallel.expert import by_expert

B, T, D, EXPERTS = 2, 6, 3, 4


def test_what_no_expert_made_is_not_read():
  """Half of the places hold NaN, as memory that nothing was written to may."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  numbers = rng.integers(0, EXPERTS + 1, (B, T, 2))  # EXPERTS: a choice that was dropped
  factors = np.where(numbers < EXPERTS, rng.normal(size=numbers.shape), 0).astype(np.float32)
  scale = rng.normal(size=(EXPERTS, 1, 1)).astype(np.float32)
  scales = np.append(scale[:, 0, 0], 0)
  factor = (factors * scales[numbers]).sum(-1)[..., None]

  weights = {"scale_eab": jnp.asarray(scale)}

  def run(rows_td, weights, sizes_e):
    group = jnp.repeat(jnp.arange(EXPERTS), sizes_e, total_repeat_length=len(rows_td))
    made_td = rows_td * weights["scale_eab"][group, 0]
    return spoil(made_td, sizes_e.sum())

  def both(x, factors):
    y, pull = jax.vjp(lambda x: by_expert(run, x, jnp.asarray(numbers), factors, weights), x)
    return y, pull(jnp.ones_like(y))[0]

  assert (numbers == EXPERTS).sum() > 2
  y, grad_x = jax.jit(both)(x, factors)
  # Sums of two terms: some roundings of 2^-24 of numbers below 4.
  assert_allclose(y, x * factor, rtol=1e-6, atol=1e-6)
  assert_allclose(grad_x, np.broadcast_to(factor, x.shape), rtol=1e-6, atol=1e-6)


@jax.custom_vjp
def spoil(rows_td, total):
  """NaN behind the last run, in both directions."""
  return jnp.where(jnp.arange(len(rows_td))[:, None] < total, rows_td, jnp.nan)


spoil.defvjp(
  lambda rows_td, total: (spoil(rows_td, total), total),
  lambda total, grad_td: (spoil(grad_td, total), None),
)
