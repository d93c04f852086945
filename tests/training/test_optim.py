"""Proves that the optimizer is clipped AdamW under a warm-up and a cosine, step for step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.training.optim import OptimConfig, make_optimizer, make_schedule
from tests.reference import optim as reference

RNG = np.random.default_rng(0)
WEIGHTS = {
  "decoder/norm/scale_d": jnp.asarray(RNG.normal(size=5), jnp.float32),
  "up_df": jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32),
}
# Norms near 6 and near 0.06: one is clipped, the other not.
GRADS = [
  {name: jnp.asarray(RNG.normal(size=w.shape) * size, jnp.float32) for name, w in WEIGHTS.items()}
  for size in (1, 0.01, 1, 1, 0.01, 3, 0.1, 1)
]
CONFIG = OptimConfig(learning_rate=0.05, warmup=3, min_lr_ratio=0.2, weight_decay=0.3)


def run(config, steps):
  optimizer = make_optimizer(config, steps, WEIGHTS)
  update = jax.jit(optimizer.update)
  weights, state = WEIGHTS, optimizer.init(WEIGHTS)
  for grads in GRADS:
    updates, state = update(grads, state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"clip_norm": 0.0},
    {"clip_norm": 0.5, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3},
    {"no_decay": ("up_df",)},
    {"no_decay": ("*",)},
    {"warmup": 0, "min_lr_ratio": 0.0},
  ],
)
def test_several_steps_equal_the_reference(changes):
  config = dataclasses.replace(CONFIG, **changes)
  grads = [{name: np.asarray(g, np.float64) for name, g in step.items()} for step in GRADS]
  if config.clip_norm:
    norms = [reference.clip(step, config.clip_norm)[1] for step in grads]
    assert min(norms) < config.clip_norm < max(norms)
    grads = [reference.clip(step, config.clip_norm)[0] for step in grads]
  expected = reference.adamw(
    WEIGHTS,
    grads,
    rate=lambda number: reference.warmup_cosine(
      number, config.learning_rate, config.warmup, len(GRADS), config.min_lr_ratio
    ),
    beta1=config.beta1,
    beta2=config.beta2,
    eps=config.eps,
    decay=config.weight_decay,
    decayed={
      (): {"up_df"}, ("*",): set(), ("up_df",): set(),  # a scale never is
    }[config.no_decay],
  )
  found = run(config, len(GRADS))
  for name in WEIGHTS:
    # Eight updates of at most 0.05 · 3, each right to some 2^3 roundings of 2^-24.
    assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6, err_msg=name)
    assert np.abs(found[name] - WEIGHTS[name]).max() > 0.01


@pytest.mark.parametrize(("warmup", "steps"), [(4, 20), (0, 10), (1, 2), (10, 10)])
def test_the_schedule_equals_the_reference_at_every_step(warmup, steps):
  schedule = make_schedule(OptimConfig(warmup=warmup, min_lr_ratio=0.25), steps, 2.0)
  for update in range(1, steps + 1):
    expected = reference.warmup_cosine(update, 2.0, warmup, steps, 0.25)
    assert_allclose(schedule(update - 1), expected, rtol=1e-6)


def test_the_schedule_peaks_after_the_warmup_and_ends_on_its_share():
  schedule = make_schedule(OptimConfig(warmup=4, min_lr_ratio=0.25), 20, 2.0)
  assert_allclose([schedule(0), schedule(1), schedule(3)], [0.5, 1, 2], rtol=1e-6)
  assert_allclose(schedule(19), 0.5, rtol=1e-6)  # the last of twenty updates
  assert_allclose(schedule(11), (2 + 0.5) / 2, rtol=1e-6)  # half way down


@pytest.mark.parametrize(("warmup", "steps"), [(100, 10), (11, 10), (10, 10)])
def test_a_run_no_longer_than_its_warmup_warms_up_from_end_to_end(warmup, steps):
  """As in transformers and Megatron: a warm-up's rates do not depend on the run's length."""
  schedule = make_schedule(OptimConfig(warmup=warmup), steps, 2.0)
  for number in range(1, steps + 1):
    assert schedule(number - 1) == pytest.approx(2.0 * number / warmup, rel=1e-6)


def test_a_no_decay_pattern_that_matches_nothing_is_a_user_error():
  config = dataclasses.replace(CONFIG, no_decay=("*/scale_d", "*/bias_d"))
  with pytest.raises(UserError, match=r"'\*/bias_d' matches no parameter"):
    make_optimizer(config, 10, WEIGHTS)


def test_the_default_spares_every_norm_of_the_decoder_and_nothing_else(tiny_decoder):
  optimizer = make_optimizer(OptimConfig(warmup=0, weight_decay=1.0), 10, tiny_decoder)
  zeros = jax.tree.map(jnp.zeros_like, tiny_decoder)
  init_and_update = jax.jit(lambda model: optimizer.update(zeros, optimizer.init(model), model))
  updates, _ = init_and_update(tiny_decoder)
  moved = {
    jax.tree_util.keystr(path): bool(np.asarray(leaf).any())
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
  }
  assert all(moves == ("scale_d" not in path) for path, moves in moved.items())


def test_muon_moves_each_layers_matrices_like_the_reference_and_adamw_the_rest():
  rng = np.random.default_rng(1)
  shapes = {"up_df": (2, 5, 7), "out_nhd": (2, 3, 2, 4), "scale_d": (2, 5), "token_vd": (9, 5)}
  weights = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
  grads = [
    {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    for _ in range(3)
  ]
  config = OptimConfig(
    kind="muon",
    learning_rate=0.05,
    matrix_learning_rate=0.1,
    warmup=1,
    weight_decay=0.3,
    no_decay=("scale_d",),
    clip_norm=0.0,
  )
  optimizer = make_optimizer(config, 3, weights)
  update = jax.jit(optimizer.update)
  found, state = weights, optimizer.init(weights)
  for grad in grads:
    updates, state = update(grad, state, found)
    found = optax.apply_updates(found, updates)

  def rate(peak):
    return lambda number: reference.warmup_cosine(number, peak, 1, 3, config.min_lr_ratio)

  # Newton–Schulz multiplies a small singular value, and its rounding, by up to 3.4 five times over:
  # 3.4^5 roundings of 2^-24, a few times.
  for name, (rows, columns) in {"up_df": (5, 7), "out_nhd": (6, 4)}.items():
    for layer in range(2):
      expected = reference.muon(
        np.asarray(weights[name][layer]).reshape(rows, columns),
        [np.asarray(grad[name][layer]).reshape(rows, columns) for grad in grads],
        rate=rate(0.1),
        decay=0.3,
      )
      got = np.asarray(found[name][layer]).reshape(rows, columns)
      assert_allclose(got, expected, atol=1e-4, err_msg=name)
      assert np.abs(got - np.asarray(weights[name][layer]).reshape(rows, columns)).max() > 0.05
  expected = reference.adamw(
    {name: weights[name] for name in ("scale_d", "token_vd")},
    [{name: grad[name] for name in ("scale_d", "token_vd")} for grad in grads],
    rate=rate(0.05),
    beta1=config.beta1,
    beta2=config.beta2,
    eps=config.eps,
    decay=0.3,
    decayed={"token_vd"},
  )
  for name, want in expected.items():
    assert_allclose(found[name], want, rtol=2e-6, atol=2e-6, err_msg=name)
