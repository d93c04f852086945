"""transformers' Llama, an implementation that shares nothing with ours, makes the golden files.

With LLMJAX_WRITE_GOLDEN=1 they are written; otherwise the committed ones must be what it says.
"""

import os

import numpy as np
import pytest

from tests import golden

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
  """Logits, loss and every gradient from torch, fp32, eager attention."""
  torch = pytest.importorskip("torch", reason="make test-oracle installs torch")
  from transformers import LlamaForCausalLM

  folder = tmp_path_factory.mktemp("llama")
  golden.write_checkpoint(folder)
  model = LlamaForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  ids = torch.from_numpy(golden.token_ids())
  logits = model(ids[:, :-1]).logits
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  grads = {f"grad.{name}": p.grad.numpy() for name, p in model.named_parameters()}
  return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), **grads}


def test_golden_files_are_what_transformers_says(truth):
  path = golden.FOLDER / "llama.npz"
  if os.environ.get("LLMJAX_WRITE_GOLDEN"):
    golden.write_checkpoint(golden.FOLDER / "llama")
    np.savez_compressed(path, **truth)
  committed = np.load(path)
  assert set(committed.files) == set(truth)
  for name, want in truth.items():
    # The same fp32 program on another machine's kernels: rounding of sums of at most 61 terms.
    np.testing.assert_allclose(committed[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_committed_checkpoint_is_the_one_drawn_here(tmp_path):
  golden.write_checkpoint(tmp_path)
  for name in ("config.json", "model.safetensors"):
    assert (golden.FOLDER / "llama" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_our_logits_equal_transformers(truth):
  import llmjax

  model = llmjax.load(golden.FOLDER / "llama")
  logits = model.logits(golden.token_ids()[:, :-1])
  # fp32 on both sides, logits of order 1: rounding over two layers stays within 1e-4.
  np.testing.assert_allclose(logits, truth["logits"], atol=1e-4)
