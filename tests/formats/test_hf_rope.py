"""Rotary positions of `config.json` files: the angles that transformers makes of them (golden)."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.canonical import canonical
from llmjax.nn.position import rope_angles
from tests.golden import ropes


def our_angles(config, length):
  """(cosines, sines) of the last of `length` positions, as a full layer has them."""
  angles = rope_angles(jnp.arange(length)[None], config.position, config.rotary_head)
  return np.array([np.asarray(table)[0, -1] for table in angles])


@pytest.mark.parametrize("name", ropes.ROPES)
def test_angles_equal_those_of_transformers_and_so_they_do_when_written(name, capsys):
  _, _, length, context = ropes.ROPES[name]
  theirs = ropes.config_of(name)
  family = hf.family_of(theirs)
  config = hf.read_config(family, theirs)
  # Angles of at most 64 rad: two fp32 roundings of the frequency and one of the product.
  tolerance = {"rtol": 0, "atol": 64 * 3 * 2**-24}
  np.testing.assert_allclose(our_angles(config, length), ropes.kept()[name], **tolerance)
  assert config.max_seq_len == context
  capsys.readouterr()
  hf.choose(config)
  assert not capsys.readouterr().err, "looking for a family tells what no file says"
  again = hf.read_config(family, hf.write_config(family, canonical(config)))
  np.testing.assert_allclose(our_angles(again, length), ropes.kept()[name], **tolerance)
  assert again.max_seq_len == context


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("both_blocks", "rope_parameters is left out: rope_scaling is there as well and comes first"),
    ("yarn_attn_factor", "rope type 'yarn' does not read attn_factor, in transformers either"),
    ("dynamic", "dynamic scaling begins behind 64 positions, which are the most that are read"),
  ],
)
def test_what_is_not_read_is_named(name, told, capsys):
  theirs = ropes.config_of(name)
  hf.read_config(hf.family_of(theirs), theirs)
  assert told in capsys.readouterr().err
