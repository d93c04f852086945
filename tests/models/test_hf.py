"""A Hugging Face Llama folder gives the logits and gradients that transformers gave (golden)."""

import json

import jax
import numpy as np
import pytest

import llmjax
from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.tasks import language_model
from llmjax.models import hf
from llmjax.train.step import loss_and_grad
from tests import golden


@pytest.fixture(scope="module")
def model():
  return llmjax.load(golden.FOLDER / "llama")


@pytest.fixture(scope="module")
def truth():
  return np.load(golden.FOLDER / "llama.npz")


def test_logits_equal_those_of_transformers(model, truth):
  logits = model.logits(golden.token_ids()[:, :-1])
  # fp32 on both sides, logits of order 1: rounding over two layers stays within 1e-4.
  np.testing.assert_allclose(logits, truth["logits"], atol=1e-4)


def test_loss_and_every_gradient_equal_those_of_transformers(model, truth):
  ids = golden.token_ids()
  batch = language_model(ids, np.ones_like(ids))
  loss, grads, count = jax.jit(loss_and_grad)(model.parameters, batch)
  assert count == 32
  np.testing.assert_allclose(loss, truth["loss"], rtol=1e-5)
  theirs = {name.removeprefix("grad."): truth[name] for name in truth.files if "grad." in name}
  want = tree.flatten(hf.from_tensors(model.config, theirs, hf.LLAMA))
  got = tree.flatten(grads)
  assert got.keys() == want.keys()
  for path, grad in got.items():
    scale = np.abs(want[path]).max()
    # fp32 backward through two layers; gradients of order 1e-2.
    np.testing.assert_allclose(grad, want[path], atol=1e-4 * scale, err_msg=path)


def test_a_folder_that_does_not_fit_is_named(tmp_path):
  golden.write_checkpoint(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())

  def edited(**values):
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    return tmp_path

  with pytest.raises(UserError, match="model_type 'gpt9' is not one of llama"):
    llmjax.load(edited(model_type="gpt9"))
  with pytest.raises(UserError, match=r"model\.layers\.2\.self_attn.*is missing"):
    llmjax.load(edited(num_hidden_layers=3))
  with pytest.raises(UserError, match="9 tensors have no place"):
    llmjax.load(edited(num_hidden_layers=1))
  with pytest.raises(UserError, match=r"weight' has shape \(61, 24\)"):
    llmjax.load(edited(vocab_size=62))
  with pytest.raises(UserError, match="scales its rotary positions"):
    llmjax.load(edited(rope_parameters={"rope_type": "yarn", "factor": 2.0}))
