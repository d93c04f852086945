"""Proves that the optimizer is clipped AdamW under a warm-up and a cosine, step for step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.core.weight import LoRA, Quantized
from llmjax.training.optim import OptimConfig, assign, make_optimizer, make_schedule
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


ROLES = {"decoder/norm/scale_d": "scale", "up_df": "matrix"}


def run(config, steps):
  optimizer = make_optimizer(config, steps, WEIGHTS, ROLES)
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
    {"groups": (("up_df", {"decay": 0.0, "rate": 0.25}), ("*", {}))},
    {"groups": (("*scale_d", {"decay": 0.5}), ("*", {"kind": "adamw"}))},
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
  rows = dict(config.groups)
  rates = {"up_df": rows.get("up_df", {}).get("rate", 1.0), "decoder/norm/scale_d": 1.0}
  decays = {  # a scale is not decayed unless a row says so
    "up_df": 0.0 if "up_df" in rows else config.weight_decay,
    "decoder/norm/scale_d": 0.5 if "*scale_d" in rows else 0.0,
  }
  expected = {}
  for name in WEIGHTS:
    expected |= reference.adamw(
      {name: WEIGHTS[name]},
      [{name: step[name]} for step in grads],
      rate=lambda number, name=name: rates[name] * reference.warmup_cosine(
        number, config.learning_rate, config.warmup, len(GRADS), config.min_lr_ratio
      ),
      beta1=config.beta1,
      beta2=config.beta2,
      eps=config.eps,
      decay=decays[name],
      decayed={name},
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


@pytest.mark.parametrize(
  ("groups", "says"),
  [
    ((("*/scale_d", {}), ("*/bias_d", {}), ("*", {})),
     r"'\*/bias_d' matches no parameters; known: decoder"),
    ((("*", {}), ("up_df", None)), "'up_df' matches only parameters that earlier rows match"),
    ((("up_*", {}),), "no row of optim.groups matches parameter 'decoder/norm/scale_d'"),
    ((), "no row of optim.groups matches"),
    ((("*", None),), "freezes all parameters"),
    ((("*scale_d", {"kind": "muon"}), ("*", {})), "matches no matrix for kind 'muon'"),
    (("up_df",), "holds 'up_df', not"),
    ((("*", {"rates": 1}),), "option 'rates' is unknown; did you mean 'rate'"),
    ((("*", {"rate": 0}),), "rate 0 is not positive"),
    ((("*", {"rate": "1"}),), "rate '1' is not positive"),
    ((("*", {"decay": -1}),), "decay -1 is not at least 0"),
    ((("*", {"rate": float("nan")}),), "rate nan is not a finite number"),
    ((("*", {"kind": "adam"}),), "kind 'adam' is unknown; did you mean 'adamw'"),
  ],
)
def test_groups_that_do_not_fit_are_user_errors(groups, says):
  with pytest.raises(UserError, match=says):
    make_optimizer(dataclasses.replace(CONFIG, groups=groups), 10, WEIGHTS, ROLES)


def test_what_a_weight_kind_never_trains_is_frozen():
  codes = Quantized(jnp.zeros((5, 7), jnp.int8), jnp.ones(7), None, "int8", "df")
  lora = LoRA(codes, jnp.ones((5, 2)), jnp.ones((2, 7)), 1.0, "df")
  weights = WEIGHTS | {"gate_df": codes, "other_df": lora}
  rows = assign(OptimConfig().groups, weights)
  assert [path for path, row in rows.items() if row is None] == [
    "gate_df/codes_df", "gate_df/scale_f", "other_df/base_df/codes_df", "other_df/base_df/scale_f"
  ]
  config = OptimConfig(groups=(("gate*", {"rate": 2.0}), ("*", {})))
  with pytest.raises(UserError, match=r"'gate\*' matches only what its weight kind never trains"):
    assign(config.groups, weights)


def test_the_default_spares_every_norm_of_the_decoder_and_nothing_else(tiny_decoder):
  optimizer = make_optimizer(OptimConfig(warmup=0, weight_decay=1.0), 10, tiny_decoder)
  weights = tree.flatten(tiny_decoder)
  zeros = jax.tree.map(jnp.zeros_like, weights)
  updates, _ = jax.jit(lambda w: optimizer.update(zeros, optimizer.init(w), w))(weights)
  for path, update in updates.items():
    assert np.asarray(update).any() == ("scale_d" not in path), path


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
    clip_norm=0.0,
  )
  roles = dict(up_df="matrix", out_nhd="matrix", scale_d="scale", token_vd="table")
  optimizer = make_optimizer(config, 3, weights, roles)
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
