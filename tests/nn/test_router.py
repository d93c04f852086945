"""Proves that every router sends tokens where the papers say, with their weights, sums and
gradients; and what capacity, padding and uneven load do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core.errors import UserError
from llmjax.nn.moe import MoeConfig
from llmjax.nn.router import hashed, route
from tests.reference import experts as reference
from tests.reference.gradient import assert_pulled

RNG = np.random.default_rng(0)
B, T, E = 2, 9, 8
LOGITS = RNG.normal(size=(B, T, E)).astype(np.float32)
# Padding in the middle of a row as well, where it would take a later token's room.
REAL = np.array([[1] * 6 + [0] * 3, [1, 1, 0, 0, 1, 1, 1, 1, 1]], bool)
TOKENS = RNG.integers(0, 1000, (B, T)).astype(np.int32)
BIAS = RNG.normal(size=E).astype(np.float32) / 2
# What a gradient comes in with: of each weight, and of each term.
PULL = RNG.normal(size=(B, T, E)).astype(np.float32)
FACTORS = {"balance": 0.7, "sequence": 1.1, "z": 0.3}
# A softmax of 8 and sums over 13 tokens of order 1: some 2^4 roundings of 2^-24.
FP32 = dict(rtol=2e-6, atol=2e-6)
pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {
  "softmax": dict(top_k=3),
  "plain": dict(top_k=3, renormalize=False, scale=1.5),
  "sigmoid": dict(top_k=2, router="sigmoid", scale=2.5),
  "sigmoid_plain": dict(top_k=2, router="sigmoid", renormalize=False),
  "bias": dict(top_k=2, bias=True),
  "best_of_groups": dict(top_k=3, groups=4, top_groups=2),
  "best_two_of_groups": dict(top_k=3, groups=2, top_groups=1, router="sigmoid", bias=True),
  "last": dict(top_k=2, capacity=0.9),
  "lightest": dict(top_k=2, capacity=0.9, drop="lightest", renormalize=False),
  "switch": dict(top_k=1, capacity=0.8, renormalize=False),
  "expert_choice": dict(top_k=2, router="expert_choice", scale=0.5),
  "expert_choice_more": dict(top_k=2, router="expert_choice", capacity=1.7),
  "hash": dict(top_k=2, router="hash", scale=0.5),
  "hash_full": dict(top_k=2, router="hash", capacity=0.6),
}


def config_of(**keys) -> MoeConfig:
  return MoeConfig(**{"experts": E, **keys})


def values_of(config) -> dict:
  return {f"moe.{key}": value for key, value in dataclasses.asdict(config).items()}


def spread(routes, e):
  """[b, t, e + 1]: a token's weight with each expert, and last with none."""
  here = jax.nn.one_hot(routes.experts_btj, e + 1)
  return jnp.einsum("btje,btj->bte", here, routes.weights_btj)


@functools.partial(jax.jit, static_argnums=0)
def run(config, logits, tokens, real, bias):
  """(weights [b, t, e], how often each is chosen [b, t, e + 1], terms, gradient of the logits)."""

  def total(logits):
    if config.router == "hash":
      routes, terms = hashed(config, tokens, real)
    else:
      routes, terms = route(config, logits, real, bias)
    weights = spread(routes, config.experts)
    sums = sum(factor * getattr(terms, name) for name, factor in FACTORS.items())
    count = jax.nn.one_hot(routes.experts_btj, config.experts + 1).sum(2)
    pulled = jnp.sum(weights[..., :-1] * PULL[tuple(map(slice, weights[..., :-1].shape))])
    return pulled + sums, (weights, count, terms)

  (_, made), grad = jax.value_and_grad(total, has_aux=True)(logits)
  return *made, grad


def by_reference(config, logits, tokens, real, bias):
  """(weights [b, t, e], how often chosen, terms)."""
  cfg, e = values_of(config), config.experts
  wanted, kept, shares = reference.routed(logits, cfg, tokens, real, bias)
  weights, count = np.zeros((*np.shape(real), e)), np.zeros((*np.shape(real), e), int)
  for b, t in np.ndindex(np.shape(real)):
    for expert, weight in kept[b][t]:
      weights[b, t, expert] += weight
      count[b, t, expert] += 1
  return weights, count, reference.terms(wanted, kept, shares, logits, real, e)


def scores(config):
  """Scores as the config's router gets them: hashing has none."""
  return np.zeros_like(LOGITS) if config.router == "hash" else LOGITS


@pytest.mark.parametrize("name", CASES)
def test_routes_terms_and_gradient_equal_the_reference(name):
  config = config_of(**CASES[name])
  bias = BIAS if config.bias else None
  logits = scores(config)
  weights, count, terms, grad = run(config, logits, TOKENS, REAL, bias)
  wide = logits.astype(np.float64)
  want, want_count, want_terms = by_reference(config, wide, TOKENS, REAL, bias)
  assert_array_equal(count[..., :-1], want_count)
  assert_allclose(weights[..., :-1], want, **FP32)
  assert_array_equal(weights[..., -1], 0)
  for key, value in want_terms.items():
    assert_allclose(getattr(terms, key), value, err_msg=key, **FP32)
  if config.capacity and config.router != "expert_choice":
    assert 0 < want_terms["dropped"] < sum(want_terms["load_e"]) / 2  # the case is one
  if config.router == "hash":
    assert not np.any(grad)
    return

  def slow(given):
    weights, _, terms = by_reference(config, given["logits"], TOKENS, REAL, bias)
    return np.sum(weights * PULL) + sum(f * terms[key] for key, f in FACTORS.items())

  # A unit direction through a gradient of size 20, whose coordinates are rounded as above.
  assert_pulled({"logits": grad}, slow, {"logits": wide}, 1.0, count=4, rtol=1e-5, atol=1e-5)
  assert_array_equal(np.asarray(grad)[~REAL], 0)


def test_a_bias_moves_the_choice_and_not_the_weight():
  config = config_of(top_k=1, renormalize=False, router="sigmoid", bias=True)
  favour = np.zeros(E, np.float32)
  favour[5] = 10
  weights, count, *_ = run(config, LOGITS, TOKENS, REAL, favour)
  assert (np.asarray(count)[REAL][:, 5] == 1).all()
  assert_allclose(np.asarray(weights)[REAL][:, 5], 1 / (1 + np.exp(-LOGITS[REAL][:, 5])), **FP32)
  pull = jax.jit(jax.grad(lambda bias: route(config, LOGITS, REAL, bias)[0].weights_btj.sum()))
  assert not np.any(pull(favour))


def test_a_token_uses_no_more_groups_than_it_may():
  config = config_of(top_k=4, groups=4, top_groups=2)
  count = np.asarray(run(config, LOGITS, TOKENS, REAL, None)[1])[..., :-1]
  groups = count.reshape(B, T, 4, 2).any(-1).sum(-1)
  assert (groups[REAL] == 2).all()


@pytest.mark.parametrize("drop", ["last", "lightest"])
def test_an_expert_takes_its_share_of_a_row_and_no_more(drop):
  """All want expert 0, with room for ⌈6 · 1 · 2.5 / 8⌉ = 2 of one row and for ⌈7 · 2.5 / 8⌉ = 3
  of the other, whose places are 9."""
  config = config_of(top_k=1, capacity=2.5, drop=drop, renormalize=False)
  assert_array_equal(config.slots(np.array([0, 6, 7, T])), [0, 2, 3, 3])
  logits = np.zeros_like(LOGITS)
  logits[..., 0] = np.array([3, 1, 2, 5, 4, 6, 9, 9, 9]) / 2
  _, count, terms, _ = run(config, logits, TOKENS, REAL, None)
  kept = [set(np.flatnonzero(row)) for row in np.asarray(count)[..., 0]]
  # Rows have padding in places 6 to 8, and in 2 and 3; of equals the first stay.
  assert kept == ([{0, 1}, {0, 1, 4}] if drop == "last" else [{3, 5}, {6, 7, 8}])
  assert float(terms.dropped) == 6 + 7 - 2 - 3
  assert_array_equal(terms.load_e, [13] + [0] * 7)  # what was wanted


@pytest.mark.parametrize("name", CASES)
def test_a_padded_row_beside_another_is_routed_as_the_reference_routes_it_alone(name):
  config = config_of(**CASES[name])
  logits, bias = scores(config), BIAS if config.bias else None
  weights, count, terms, _ = run(config, logits, TOKENS, REAL, bias)
  alone = []
  for row, real in enumerate(REAL):
    own = (array[row : row + 1, real] for array in (logits.astype(np.float64), TOKENS, REAL))
    alone.append(by_reference(config, *own, bias))
    assert_allclose(weights[row, real, :-1], alone[-1][0][0], **FP32)
    assert_array_equal(count[row, real, :-1], alone[-1][1][0])
  for term in ("tokens", "load_e", "dropped", "entropy", "sequence", "z"):  # all but the batch's
    total = np.sum([made[2][term] for made in alone], axis=0)
    assert_allclose(getattr(terms, term), total, err_msg=term, **FP32)


def test_second_choices_are_dropped_before_first_ones():
  config = config_of(experts=2, top_k=2, capacity=0.5, renormalize=False)
  logits = np.zeros((1, 4, 2), np.float32)
  logits[0, :, 1] = [-1, -1, 1, 1]  # tokens 0 and 1 want expert 0 first, 2 and 3 expert 1
  _, count, terms, _ = run(config, logits, TOKENS[:1, :4], np.ones((1, 4), bool), None)
  assert_array_equal(np.asarray(count)[0, :, :2], [[1, 0], [1, 0], [0, 1], [0, 1]])
  assert float(terms.dropped) == 4


@pytest.mark.parametrize(
  ("name", "drop"), [("softmax", "last"), ("sigmoid", "lightest"), ("hash", "last")]
)
def test_room_enough_changes_nothing(name, drop):
  open_ = config_of(**CASES[name])
  roomy = dataclasses.replace(open_, capacity=E / open_.top_k, drop=drop)
  one, other = (run(config, LOGITS, TOKENS, REAL, None) for config in (open_, roomy))
  assert float(other[2].dropped) == 0
  assert_array_equal(one[1], other[1])
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert_allclose(a, b, **FP32)  # the same sums through two graphs


@pytest.mark.parametrize("name", CASES)
def test_padding_goes_nowhere_takes_no_room_and_is_in_no_sum(name):
  """Whatever stands in padding, all else is the same bit for bit."""
  config = config_of(**CASES[name])
  bias = BIAS if config.bias else None
  other = np.where(REAL[..., None], scores(config), 7 - 3 * LOGITS).astype(np.float32)
  tokens = np.where(REAL, TOKENS, TOKENS + 1)
  weights, count, terms, _ = run(config, scores(config), TOKENS, REAL, bias)
  again = run(config, other, tokens, REAL, bias)
  assert not np.any(np.asarray(count)[~REAL][:, :-1])
  assert_array_equal(again[0], weights)
  for a, b in zip(jax.tree.leaves(again[2]), jax.tree.leaves(terms), strict=True):
    assert_array_equal(a, b)


def test_balance_is_1_where_load_is_even_and_the_number_of_experts_where_one_has_all():
  config = config_of(top_k=1)
  real = np.ones((1, E), bool)
  even = 200 * np.eye(E, dtype=np.float32)[None]  # each token its own expert, for certain
  terms = run(config, even, TOKENS[:1, :E], real, None)[2]
  assert_allclose([terms.balance / E, terms.sequence / E], 1, rtol=1e-6)
  assert_allclose(terms.entropy, 0, atol=1e-6)
  flat = run(config, 0 * even, TOKENS[:1, :E], real, None)[2]  # probabilities are even: again 1
  assert_allclose([flat.balance / E, flat.entropy / E], [1, np.log(E)], rtol=1e-6)
  assert_allclose(flat.z / E, np.log(E) ** 2, rtol=1e-6)
  collapsed = np.zeros_like(even)
  collapsed[..., 3] = 200
  terms = run(config, collapsed, TOKENS[:1, :E], real, None)[2]
  assert_allclose([terms.balance / E, terms.sequence / E], E, rtol=1e-6)
  # Of top 2 of which the second is anybody's, half the places are elsewhere.
  terms = run(config_of(top_k=2), collapsed, TOKENS[:1, :E], real, None)[2]
  assert_allclose(terms.balance / E, E / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "bias", "last", "hash"])
def test_sums_over_rows_add_up_but_for_balance(name):
  config = config_of(**CASES[name])
  bias = BIAS if config.bias else None
  rows = [slice(0, 1), slice(1, 2)]
  parts = [run(config, scores(config)[r], TOKENS[r], REAL[r], bias)[2] for r in rows]
  added = jax.tree.map(jnp.add, *parts)
  whole = run(config, scores(config), TOKENS, REAL, bias)[2]
  for key in ("tokens", "load_e", "dropped", "entropy", "sequence", "z"):
    assert_allclose(getattr(added, key), getattr(whole, key), err_msg=key, **FP32)
  # Balance of a row by itself is its sequence balance.
  assert_allclose(added.balance, whole.sequence, **FP32)
  assert name == "hash" or abs(float(added.balance - whole.balance)) > 1e-3


def test_a_row_of_padding_and_one_of_nothing_wanted_are_finite():
  for name in ("softmax", "sigmoid", "last", "expert_choice", "hash"):
    config = config_of(**CASES[name])
    made = run(config, scores(config), TOKENS, np.zeros_like(REAL), None)
    for leaf in jax.tree.leaves(made):
      assert np.isfinite(leaf).all()
    assert not np.any(made[3]) and not np.any(made[0])


def test_huge_scores_neither_overflow_nor_lose_the_gradient():
  for name in ("softmax", "sigmoid", "sigmoid_plain"):
    made = run(config_of(**CASES[name]), 1e4 * LOGITS, TOKENS, REAL, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made)), name
    low = run(config_of(**CASES[name]), LOGITS - 200, TOKENS, REAL, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(low)), name


def test_a_hash_is_a_function_of_the_id_and_even_over_ids():
  config = config_of(top_k=2, router="hash")
  ids = np.arange(8000, dtype=np.int32).reshape(4, 2000)
  run = jax.jit(lambda ids: hashed(config, ids, jnp.ones_like(ids, bool)))
  routes, terms = run(ids)
  experts = np.asarray(routes.experts_btj)
  assert (experts[..., 0] != experts[..., 1]).all()
  assert_array_equal(routes.weights_btj, 0.5)
  again = run(ids[::-1, ::-1])[0].experts_btj
  assert_array_equal(again, experts[::-1, ::-1])
  # Random would be 2000 ± 39 of 16,000 places; five standard deviations.
  assert np.abs(np.asarray(terms.load_e) - 2000).max() < 5 * 39


REFUSED = {
  "top_k changes nothing without model.moe.experts": dict(experts=0, top_k=1),
  "bias changes nothing without model.moe.experts": dict(experts=0, bias=True),
  "router 'softmx' is unknown; .*softmax": dict(router="softmx"),
  "drop 'first' is unknown": dict(drop="first"),
  "experts -1 is less than 0": dict(experts=-1),
  "top_k 0 is less than 1": dict(top_k=0),
  "width -1 is less than 0": dict(width=-1),
  "shared -1 is less than 0": dict(shared=-1),
  "first_k_dense -1 is less than 0": dict(first_k_dense=-1),
  "groups 0 is less than 1": dict(groups=0),
  "top_groups 0 is less than 1": dict(top_groups=0),
  "capacity -0.5 is less than 0": dict(capacity=-0.5),
  "experts 8 is not a multiple of groups 3": dict(groups=3),
  "top_groups 3 of 2 groups": dict(groups=2, top_groups=3),
  "top_k 3 is more than the 2 experts a token may use": dict(top_k=3, groups=4),
  "top_k 9 is more than the 8 experts": dict(top_k=9),
  "scale 0 is not positive": dict(scale=0),
  "bias changes nothing with router=expert_choice": dict(router="expert_choice", bias=True),
  "bias changes nothing with router=hash": dict(router="hash", bias=True),
  "noisy changes nothing with router=hash": dict(router="hash", noisy=True),
  "groups changes nothing with router=hash": dict(router="hash", groups=2),
  "renormalize changes nothing with router=expert_choice": dict(
    router="expert_choice", renormalize=False
  ),
  "drop changes nothing without model.moe.capacity": dict(drop="lightest"),
  "drop changes nothing with router=expert_choice": dict(
    router="expert_choice", drop="lightest", capacity=1.0
  ),
  "drop changes nothing with router=hash": dict(router="hash", drop="lightest", capacity=1.0),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_or_changes_nothing_is_a_user_error_that_names_the_key(says):
  with pytest.raises(UserError, match=f"^model.moe.{says}") as found:
    config_of(**REFUSED[says])
  assert "\n" not in str(found.value)
