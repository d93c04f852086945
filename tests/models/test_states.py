"""Proves that the states between blocks and the weights of attention are those of the reference."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.models.states import attention_maps, hidden_states
from tests.models.variants import (
  VARIANTS,
  batch_of,
  inputs,
  reference_config,
  values_of,
  weights_of,
)
from tests.reference import decoder as reference

FP32 = 5e-6  # of the largest state, for the reason in test_variants.py
# Each has another place of the norm, mask, kind of scores or group of layers.
NAMES = ["llama", "gemma2", "gptoss", "gptj", "olmo2", "post", "mla"]
SLOW = ["alibi", "deepseek", "bert"]


def recorded(name, monkeypatch):
  """The reference's states before each block and weights of attention [l, b, n, t, s]."""
  states, maps, block, attend = [], [], reference.block, reference.attend

  def watched_block(x, *rest):
    states.append(x)
    maps.append([])
    return block(x, *rest)

  def watched_attend(q_btnh, k_bskh, v_bskh, *rest):
    b, s, k, _ = k_bskh.shape
    each_key = np.broadcast_to(np.eye(s)[None, :, None], (b, s, k, s))
    maps[-1].append(attend(q_btnh, k_bskh, each_key, *rest))
    return attend(q_btnh, k_bskh, v_bskh, *rest)

  monkeypatch.setattr(reference, "block", watched_block)
  monkeypatch.setattr(reference, "attend", watched_attend)
  config = VARIANTS[name]
  model, given = weights_of(config), inputs(config)
  reference.logits(values_of(model), reference_config(config), given)
  maps = [np.concatenate(each, axis=2).swapaxes(1, 2) for each in maps]  # latent: a head at a time
  return model, given, np.stack(states), np.stack(maps)


@pytest.mark.parametrize("name", NAMES + [pytest.param(n, marks=pytest.mark.slow) for n in SLOW])
def test_states_and_attention_are_the_reference_s(name, monkeypatch, quick_compile):
  model, given, states, maps = recorded(name, monkeypatch)
  batch, layers = batch_of(given), model.config.layers
  real = (given["segments"] if "segments" in given else np.ones(batch.tokens_bt.shape)) > 0
  found = np.asarray(hidden_states(model, batch, range(layers)))
  size = np.abs(states[:, real]).max()
  assert_allclose(found[:, real], states[:, real], rtol=0, atol=FP32 * size)
  weights = np.asarray(attention_maps(model, batch)).swapaxes(2, 3)[:, real]
  expected = maps.swapaxes(2, 3)[:, real]
  assert expected.max() > 0.3  # not all alike
  # Weights are at most 1, their scores as exact as states are.
  assert_allclose(weights, expected, rtol=0, atol=FP32 * 10)
  last = model.stack.final_norm(hidden_states(model, batch, [-1])[0])
  read = jax.jit(lambda model, batch: model.stack(
    model.embed_tokens(batch), model.layer_inputs(batch)
  )[0])(model, batch)
  assert_allclose(np.asarray(last)[real], np.asarray(read)[real], rtol=0, atol=FP32 * size)


def test_a_layer_that_is_not_there_is_named(quick_compile):
  model, given = weights_of(VARIANTS["llama"]), inputs(VARIANTS["llama"])
  with pytest.raises(UserError, match="no layer 3; layers are numbered from 0 to 2"):
    hidden_states(model, batch_of(given), [0, 3])
  with pytest.raises(UserError, match="no layer -3; layers are numbered from 0 to 1"):
    attention_maps(model, batch_of(given), [-3])
