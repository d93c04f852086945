"""Proves that the cache puts each row's keys and values in the slots of their positions."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.cache.dense import KVCache


def test_rows_write_to_slots_of_their_own_and_leave_the_others():
  old = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2, 3)), jnp.float32)
  new = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 3)), jnp.float32)
  positions = np.array([[0, 1], [3, 2]])
  made = KVCache.of(old, -old).write(KVCache.of(new, 2 * new), jnp.asarray(positions))
  key, value = np.array(old), np.array(-old)
  for row in range(2):
    for place in range(2):
      key[row, positions[row, place]] = new[row, place]
      value[row, positions[row, place]] = 2 * new[row, place]
  assert_array_equal(made.key_bskh, key)
  assert_array_equal(made.value_bskh, value)


def test_the_cache_keeps_its_dtype_and_the_old_one_its_content():
  old = KVCache.of(jnp.zeros((1, 3, 1, 2), jnp.bfloat16), jnp.zeros((1, 3, 1, 2), jnp.bfloat16))
  new = jnp.full((1, 1, 1, 2), 1 / 3, jnp.float32)
  made = old.write(KVCache.of(new, new), jnp.array([[1]]))
  assert made.key_bskh.dtype == made.value_bskh.dtype == jnp.bfloat16
  assert made.key_bskh[0, 1, 0, 0] == jnp.bfloat16(1 / 3)
  assert not old.key_bskh.any()


def test_a_pattern_may_name_kinds_of_layers_that_the_stack_is_too_short_for():
  attention = AttentionConfig(pattern=("window", "window", "full"), window=4)
  config = ModelConfig(
    layers=2, width=8, heads=2, mlp_width=8, vocab_size=16, attention=attention
  )
  batch = Batch(jnp.zeros((1, 3), jnp.int32))
  run = lambda model: model.hidden(batch, model.init_cache(batch, 8))[0]  # noqa: E731
  assert jax.eval_shape(run, abstract(config)).shape == (1, 3, 8)
