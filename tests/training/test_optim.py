"""Proves that every optimizer is that of its paper, step for step, and what groups decide."""

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
from llmjax.training.optim import OptimConfig, assign, make_optimizer
from llmjax.training.optimizers import KINDS, averaged, gradient_point
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


SCALE = "decoder/norm/scale_d"
LARGE = {
  SCALE: jnp.asarray(RNG.normal(size=5), jnp.float32),
  "up_df": jnp.asarray(RNG.normal(size=(128, 130)), jnp.float32),  # Adafactor factors it
}
NOISE = {name: RNG.normal(size=(10, *w.shape)).astype(np.float32) for name, w in LARGE.items()}


def ten_steps(config):
  """Ten steps down a paraboloid whose gradients are noisy, as `training.step` takes them."""
  optimizer = make_optimizer(config, 10, LARGE, ROLES)

  @jax.jit
  def step(weights, state, noise):
    point = gradient_point(state, weights)
    grads = {name: 0.5 * w + noise[name] for name, w in point.items()}
    updates, state = optimizer.update(grads, state, point)
    return averaged(state, optax.apply_updates(point, updates)), state

  weights, state = LARGE, optimizer.init(LARGE)
  for number in range(10):
    weights, state = step(weights, state, {name: noise[number] for name, noise in NOISE.items()})
  return weights


def expected_of(config, name, kind, decay, factor=1.0):
  name_of = "constant" if config.schedule == "constant" else "cosine"
  peak = factor * (config.matrix_learning_rate if kind == "muon" else config.learning_rate)
  return reference.descend(
    kind, LARGE[name], lambda w, number: 0.5 * w + NOISE[name][number - 1], steps=10,
    rate=lambda u: reference.schedule(name_of, u, peak, config.warmup, 10, config.min_lr_ratio),
    beta1=config.beta1, beta2=config.beta2, eps=config.eps, decay=decay,
  )


def compare(found, expected, name, kind):
  # Ten updates of at most 0.05 · 3, each right to 2^4 roundings of 2^-24; Newton–Schulz as below.
  atol = 1e-4 if kind == "muon" else 1e-5
  assert_allclose(found[name], expected, rtol=0, atol=atol, err_msg=name)
  assert np.abs(expected - LARGE[name]).max() > 100 * atol


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_of_every_kind_equal_the_reference_with_its_decay(kind):
  """Decay is λ · rate · w for matrices and nothing for scales; Adam has none."""
  schedule = "constant" if kind == "schedule_free" else "cosine"
  config = dataclasses.replace(CONFIG, kind=kind, schedule=schedule, clip_norm=0.0)
  found = ten_steps(config)
  decay = 0.0 if kind == "adam" else config.weight_decay
  compare(found, expected_of(config, "up_df", kind, decay), "up_df", kind)
  expected = expected_of(config, SCALE, "adamw" if kind == "muon" else kind, 0.0)
  compare(found, expected, SCALE, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_of_groups_of_another_kind_rate_and_decay_equal_the_reference(kind):
  decay = 0.0 if kind == "adam" else 0.7
  rows = (("up_df", {"kind": kind, "rate": 0.5, "decay": decay}), ("*", {"decay": 0.4}))
  config = dataclasses.replace(
    CONFIG, kind="sgd", schedule="constant", clip_norm=0.0, groups=rows, learning_rate=0.06
  )
  found = ten_steps(config)
  compare(found, expected_of(config, "up_df", kind, decay, 0.5), "up_df", kind)
  compare(found, expected_of(config, SCALE, "sgd", 0.4), SCALE, "sgd")


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
    ((("*", {"kind": "adamax"}),), "kind 'adamax' is unknown; did you mean 'adam"),
    ((("*", {"kind": "soap"}),), "kind 'soap' is not offered: optax has none"),
    ((("*", {"kind": "schedule_free"}),), "needs optim.schedule constant, not cosine"),
    ((("*", {"kind": "adam", "decay": 0.1}),), "decay of '.*': kind 'adam' has none; use 'adamw'"),
  ],
)
def test_groups_that_do_not_fit_are_user_errors(groups, says):
  with pytest.raises(UserError, match=says):
    make_optimizer(dataclasses.replace(CONFIG, groups=groups), 10, WEIGHTS, ROLES)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"kind": "sophia"}, "optim.kind 'sophia' is not offered: its estimate of the Hessian"),
    ({"kind": "lyon"}, "optim.kind 'lyon' is unknown; did you mean 'lion'"),
    ({"kind": "schedule_free"}, "'schedule_free' needs optim.schedule constant, not cosine"),
    ({"kind": "schedule_free", "schedule": "constant", "beta1": 0.0}, "an optim.beta1 above 0"),
  ],
)
def test_kinds_that_cannot_run_are_user_errors(changes, says):
  with pytest.raises(UserError, match=says):
    OptimConfig(**changes)


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
