"""Proves what each token can change: nothing outside its document or its mask, bit for bit, and all
that the reference says it reaches; that packing changes nothing; that the cache equals the row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.models.variants import (
  TEXT,
  VARIANTS,
  batch_of,
  inputs,
  make_config,
  reference_config,
  values_of,
  weights_of,
)
from tests.reference import decoder as reference
from tests.reference.model_layers import masks

# As in test_variants.py: roundings of 2^-24 (2^-9) of the largest logit, some 2^6 (10) of them.
ROUNDING = {"float32": 5e-6, "bfloat16": 0.04}
# Where images stand, changing a token moves them; test_vision.py has these.
PLAIN = [name for name in TEXT if not VARIANTS[name].vision.image_size]
CACHED = [name for name in PLAIN if VARIANTS[name].kind != "encoder"]
CACHED.remove("both_ways")  # what comes later cannot be in a cache
CACHED.remove("untied")  # longrope turns all keys anew in a long row: tests/serve/test_lengths.py


def mixing(config) -> str:
  """Of which tokens of a row, whatever their document, a token's experts depend: none, those
  before it, or all.

  Where an expert has room for so many of a row, a token's place hangs on who else wants it: on
  those before it where the last ones are dropped; a second choice waits for all first ones.
  """
  moe = config.moe
  if not moe.experts or not moe.slots(config.max_seq_len):
    return "none"
  first_come = moe.router != "expert_choice" and moe.drop == "last" and moe.top_k == 1
  return "before" if first_come else "all"


MIXING = [name for name in PLAIN if mixing(VARIANTS[name]) != "none"]
# A cache holds no other token's wish for an expert (`roomy` below has room for all).
CACHED = [name for name in CACHED if name not in MIXING]
pytestmark = pytest.mark.usefixtures("quick_compile")


@jax.jit
def run(model, batch):
  return model.logits(model.hidden(batch)[0])


def row(given, number):
  return {name: array[number : number + 1] for name, array in given.items()}


def reached(config, given):
  """[t, t]: whether token j (second axis) can change the logits at i, by the reference's masks and
  what `mixing` says of experts.
  """
  cfg = reference_config(config)
  causal = config.kind != "encoder" and config.attention.mask != "bidirectional"
  t = given["tokens"].shape[1]
  through = np.eye(t, dtype=bool)
  for layer in range(config.layers):
    kind = config.attention.pattern[layer % len(config.attention.pattern)]
    see = masks(kind, cfg, causal, given["positions"], given["segments"], given.get("prefix"))[0]
    through = (see.astype(int) @ through.astype(int) > 0) | through
    if mixing(config) != "none" and layer >= config.moe.first_k_dense:
      real = given["segments"][0] > 0
      rivals = real[:, None] & real & (mixing(config) == "all" or np.tri(t, dtype=bool))
      through = (rivals.astype(int) @ through.astype(int) > 0) | through
  return through


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in MIXING])
def test_a_token_changes_what_it_reaches_and_nothing_else_bit_for_bit(name):
  config = VARIANTS[name]
  model, given = weights_of(config), row(inputs(config), 0)
  through = reached(config, given)
  before = np.asarray(run(model, batch_of(given)))[0]
  places = range(0, given["tokens"].shape[1], 1 if config.max_seq_len < 40 else 7)
  for place in places:
    changed = given["tokens"].copy()
    changed[0, place] = (changed[0, place] + 1) % 30
    after = np.asarray(run(model, batch_of({**given, "tokens": changed})))[0]
    same = ~through[:, place]
    assert_array_equal(after[same], before[same], err_msg=f"token {place}")
    if config.dtype == "float32":  # a coarser dtype may round a small change away
      assert (np.abs(after - before).max(-1)[~same] > 0).all(), f"token {place}"


@pytest.mark.parametrize("name", MIXING)
def test_where_experts_have_room_for_some_a_token_changes_what_the_reference_says(name):
  config = VARIANTS[name]
  model, given = weights_of(config), row(inputs(config), 0)
  weights, cfg, through = values_of(model), reference_config(config), reached(config, given)
  before = np.asarray(run(model, batch_of(given)))[0]
  slow = reference.logits(weights, cfg, given)[0]
  across = 0
  for place in range(given["tokens"].shape[1]):
    changed = given["tokens"].copy()
    changed[0, place] = (changed[0, place] + 1) % 30
    after = np.asarray(run(model, batch_of({**given, "tokens": changed})))[0]
    moved = np.abs(reference.logits(weights, cfg, {**given, "tokens": changed})[0] - slow).max(-1)
    same = moved < 1e-12  # float64 leaves what is not reached as it was, up to 2^-52
    assert same[~through[:, place]].all(), f"token {place} reaches further than `reached` says"
    assert_array_equal(after[same], before[same], err_msg=f"token {place}")
    assert (np.abs(after - before).max(-1)[moved > 1e-4] > 0).all(), f"token {place}"
    across += (~same & (given["segments"][0] != given["segments"][0, place])).sum()
  assert across  # the case is one: a token moved another document's


@pytest.mark.parametrize("name", MIXING)
def test_padding_takes_no_experts_room(name):
  """A padded row, as evaluation has it, against the reference's row without padding."""
  config, length = VARIANTS[name], 7
  model, given = weights_of(config), row(inputs(config), 1)
  logits = run(model, batch_of({key: np.where(np.arange(array.shape[1]) < length, array, 0)
                                for key, array in given.items()}))[0, :length]
  alone = {key: array[:, :length] for key, array in given.items()}
  expected = reference.logits(values_of(model), reference_config(config), alone)[0]
  atol = ROUNDING[config.dtype] * np.abs(expected).max()
  assert_allclose(logits, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in PLAIN if "source" in inputs(VARIANTS[name])])
def test_a_source_token_changes_the_target_of_its_number_alone_bit_for_bit(name):
  config = VARIANTS[name]
  model, given = weights_of(config), row(inputs(config), 0)
  before = np.asarray(run(model, batch_of(given)))[0]
  for place in range(given["source"].shape[1] - 1):
    changed = given["source"].copy()
    changed[0, place] = (changed[0, place] + 1) % 30
    after = np.asarray(run(model, batch_of({**given, "source": changed})))[0]
    same = given["segments"][0] != given["source_segments"][0, place]
    assert_array_equal(after[same], before[same])
    assert (np.abs(after - before).max(-1)[~same] > 0).all()


# Where an expert has room for so many of a row's tokens, all of the row decide how many.
@pytest.mark.parametrize("name", [name for name in PLAIN if mixing(VARIANTS[name]) == "none"])
def test_a_packed_document_equals_itself_alone(name):
  config, number = VARIANTS[name], 2
  model, given = weights_of(config), row(inputs(config), 0)
  packed = np.asarray(run(model, batch_of(given)))[0]
  here = given["segments"][0] == number
  there = given.get("source_segments", given["segments"])[0] == number
  alone = {}
  for key, array in given.items():  # the document first, padding after it: the same shapes
    part = array[:, there if key.startswith("source") else here]
    alone[key] = np.zeros_like(array)
    alone[key][:, : part.shape[1]] = part
  logits = np.asarray(run(model, batch_of(alone)))[0][: here.sum()]
  size = np.abs(packed).max()
  assert_allclose(logits, packed[here], rtol=0, atol=ROUNDING[config.dtype] * size)


OTHERS = {
  "roomy": {"moe.experts": 4, "moe.top_k": 2, "moe.capacity": 2.0},
  "prefix_full": {"attention.mask": "prefix"},
  "prefix_window": {
    "attention.mask": "prefix", "attention.pattern": ("window",), "attention.window": 2,
    "layers": 1,
  },
}


@pytest.mark.parametrize("name", [*CACHED, *OTHERS])
def test_decoding_with_the_cache_equals_the_row_in_the_reference(name):
  config = make_config(**OTHERS[name]) if name in OTHERS else VARIANTS[name]
  model, given = weights_of(config), whole_rows(config)
  expected = reference.logits(values_of(model), reference_config(config), given)

  @jax.jit
  def step(model, batch, cache):
    x_btd, cache, _ = model.hidden(batch, cache)
    return model.logits(x_btd), cache

  own = [key for key in given if not key.startswith("source")]
  t, chunk = given["tokens"].shape[1], 3
  if config.kind == "encoder_decoder":
    cache = jax.jit(lambda model, batch: model.init_cache(batch, t + 2))(model, batch_of(given))
  else:
    cache = model.decoder.empty_cache(2, t + 2)
  found = []
  for start in range(0, t, chunk):
    part = {key: given[key][:, start : start + chunk] for key in own}
    logits, cache = step(model, batch_of(part), cache)
    found.append(logits)
  size = np.abs(expected).max()
  atol = ROUNDING[config.dtype] * size
  assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=atol)
  assert len(cache.layers) == config.layers and cache.slots == t + 2
  assert not any(np.any(layer.key_bksh[:, :, t:]) for layer in cache.layers)


def whole_rows(config):
  """Rows of one document each, the first three tokens a prefix; some of one source is padding."""
  given = inputs(config)
  t = given["tokens"].shape[1]
  given["positions"] = np.arange(t) + np.zeros((2, 1), np.int32)
  del given["segments"]
  if "prefix" in given:
    given["prefix"] = given["positions"] < np.array([[2], [3]])
  if "source" in given:
    s = given["source"].shape[1]
    given["source_positions"] = np.arange(s) + np.zeros((2, 1), np.int32)
    given["source_segments"] = (given["source_positions"] < np.array([[s - 3], [s]])).astype(int)
  return given


def test_one_token_at_a_time_equals_the_row_and_slots_may_wait():
  config = VARIANTS["gemma2"]
  model, given = weights_of(config), whole_rows(config)
  expected = reference.logits(values_of(model), reference_config(config), given)
  step = jax.jit(lambda model, tokens, places, cache: model(tokens, None, places, cache))
  cache = model.decoder.empty_cache(2, 20)
  for place in range(given["tokens"].shape[1]):
    one = slice(place, place + 1)
    logits, cache = step(model, given["tokens"][:, one], given["positions"][:, one], cache)
    atol = 5e-6 * np.abs(expected).max()
    assert_allclose(logits[:, 0], expected[:, place], rtol=0, atol=atol)


def test_positions_and_segments_default_to_one_document():
  config = VARIANTS["gpt2"]
  model, given = weights_of(config), whole_rows(config)
  ones = jnp.ones_like(given["tokens"])
  written = run(model, batch_of({**given, "segments": ones}))
  left_out = run(model, batch_of({"tokens": given["tokens"]}))
  # The same numbers through two graphs.
  assert_allclose(left_out, written, rtol=0, atol=5e-6 * np.abs(written).max())
