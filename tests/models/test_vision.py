"""Proves that images become patches, patches stand where image tokens do, and towers learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llmjax.core import tree
from llmjax.models.vision import patchify
from tests.models.variants import VARIANTS, batch_of, inputs, weights_of

pytestmark = pytest.mark.usefixtures("quick_compile")
TOKEN = VARIANTS["llava"].vision.image_token


@jax.jit
def hidden(model, batch, key=None):
  return model.hidden(batch, key=key)[0]


def one_document(config, places, images):
  """A row whose image tokens stand at `places`, and so many images."""
  given = inputs(config)
  tokens = np.arange(12, dtype=np.int32)[None] + 1
  tokens[0, places] = TOKEN
  return {"tokens": tokens, "patches": given["patches"][:1, : 4 * images]}


@pytest.mark.parametrize(("side", "patch", "channels"), [(6, 2, 3), (4, 4, 1), (6, 3, 2)])
def test_patches_are_cut_row_by_row(side, patch, channels):
  images = np.random.default_rng(0).normal(size=(2, side, side, channels))
  found = patchify(images, patch)
  n = side // patch
  assert found.shape == (2, n * n, channels * patch * patch)
  for image, row, column in np.ndindex(2, n, n):
    numbers = [
      images[image, row * patch + y, column * patch + x, c]
      for c in range(channels)
      for y in range(patch)
      for x in range(patch)
    ]
    assert_array_equal(found[image, row * n + column], numbers)


def test_image_tokens_take_patches_in_their_order():
  config = VARIANTS["llava"]
  model = weights_of(config)
  places = [1, 2, 3, 4, 6, 8, 9, 11]  # two images, the second in parts
  given = one_document(config, places, images=2)
  here, stand_in = model._images(batch_of(given), None)
  assert_array_equal(np.flatnonzero(here[0]), places)
  for number in range(2):
    alone = model.vision.features(given["patches"][:, 4 * number : 4 * number + 4])
    expected = model.projector(alone)[0]
    mine = stand_in[0, np.array(places[4 * number : 4 * number + 4])]
    # The same products in batches of other sizes.
    assert_allclose(mine, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_what_stood_in_the_place_of_an_image_token_does_not_matter():
  config = VARIANTS["llava"]
  model = weights_of(config)
  given = one_document(config, [1, 2, 3, 4], images=1)
  loud = tree.map_with_path(
    lambda path, leaf: leaf.at[TOKEN].set(99.0) if path == "embed/token_vd" else leaf, model
  )
  assert_array_equal(hidden(model, batch_of(given)), hidden(loud, batch_of(given)))


def test_a_patch_changes_nothing_before_its_place_and_all_after():
  config = VARIANTS["llava"]
  model = weights_of(config)
  given = one_document(config, [1, 2, 3, 4, 7, 8, 9, 10], images=2)
  before = np.asarray(hidden(model, batch_of(given)))
  for patch, first in ((0, 1), (5, 7)):  # within an image every patch sees every other
    changed = given["patches"].copy()
    changed[0, patch] += 1
    after = np.asarray(hidden(model, batch_of({**given, "patches": changed})))
    assert_array_equal(after[0, :first], before[0, :first])
    assert (np.abs(after - before)[0, first:].max(-1) > 1e-5).all()


def test_the_gradient_reaches_every_weight_of_the_tower_and_the_projector():
  config = VARIANTS["llava"]
  model = weights_of(config)
  given = one_document(config, [1, 2, 3, 4], images=1)
  loss = lambda model: jnp.sum(jnp.sin(hidden(model, batch_of(given))))  # noqa: E731
  grads = tree.flatten(jax.jit(jax.grad(loss))(model))
  towers = {path: grad for path, grad in grads.items() if path.startswith(("vision", "projector"))}
  assert len(towers) > 20
  for path, grad in towers.items():
    if not path.endswith("key_bias_kh"):  # shifts a query's scores alike
      assert float(jnp.abs(grad).max()) > 1e-6, path


def test_images_without_tokens_and_rows_without_images_are_the_text_alone():
  config = VARIANTS["llava"]
  model = weights_of(config)
  given = one_document(config, [], images=1)
  with_images = hidden(model, batch_of(given))
  alone = hidden(model, batch_of({"tokens": given["tokens"]}))
  assert_allclose(with_images, alone, rtol=0, atol=5e-6 * np.abs(alone).max())


def test_the_tower_drops_too():
  config = dataclasses.replace(VARIANTS["llava"], dropout=0.5)
  model = weights_of(config)
  given = one_document(config, [1, 2, 3, 4], images=1)
  still, dropped, again = (
    model._images(batch_of(given), key)[1] for key in (None, jax.random.key(0), jax.random.key(0))
  )
  assert_array_equal(dropped, again)
  assert (np.abs(still - dropped) > 1e-4).mean() > 0.9


@pytest.mark.parametrize("name", ["vit", "vit_mean"])
def test_images_of_a_batch_do_not_see_each_other(name):
  config = VARIANTS[name]
  model, given = weights_of(config), inputs(config)
  before = np.asarray(hidden(model, batch_of(given)))
  given["patches"][1] += 1
  after = np.asarray(hidden(model, batch_of(given)))
  assert_array_equal(after[0], before[0])
  assert before.shape == (2, 1, config.width) and (after[1] != before[1]).any()
