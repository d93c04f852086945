"""transformers, an implementation that shares nothing with ours, judges every family both ways.

With LLMJAX_WRITE_GOLDEN=1 the golden files are written; otherwise the committed ones must be what
it says.
"""

import dataclasses
import json
import os
import shutil
import zlib

import jax
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.formats.hf import folder as hf
from llmjax.models.build import build
from llmjax.models.model import Model
from llmjax.models.states import attention_maps, hidden_states
from tests import golden

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="make test-oracle installs torch")
import transformers

# fp32 on both sides, logits of order 1 to 10: rounding over two to five layers stays within 1e-4.
ATOL = 1e-4


def _theirs(name):
  """A transformers model of a case; every weight drawn anew, none at its initial value."""
  kind, values = golden.CASES[name]
  model_class = getattr(transformers, kind)
  config = model_class.config_class(**values)
  config._attn_implementation = "eager"
  model = model_class(config).eval()
  with torch.no_grad():
    biases = [pair for pair in model.named_buffers() if "correction_bias" in pair[0]]
    for path, weight in [*model.named_parameters(), *biases]:
      if "embed_positions" in path:  # Marian's are sinusoids, which no checkpoint changes
        continue
      rng = np.random.default_rng(zlib.crc32(path.encode()))
      drawn = rng.standard_normal(tuple(weight.shape)) * 0.3
      plain_scale = "norm" in path.lower() and path.endswith("weight") and "gemma" not in name
      weight.copy_(torch.from_numpy(drawn + (1 if plain_scale else 0)))
  return model


def _say(model, name) -> np.ndarray:
  given = golden.inputs(name)
  made = model(**{key: torch.from_numpy(array) for key, array in given.items()})
  return golden.zero_padding(made.logits.detach().numpy(), given)


@pytest.fixture(scope="module", params=golden.CASES)
def case(request, tmp_path_factory):
  """(name, folder as transformers saves it, what transformers says)."""
  name = request.param
  model = _theirs(name)
  folder = tmp_path_factory.mktemp(name) / name
  model.save_pretrained(folder)
  said = {"logits": _say(model, name)}
  if name == "llama":
    ids = torch.from_numpy(golden.token_ids())
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    said["loss"] = loss.detach().numpy()
    said |= {f"grad.{path}": weight.grad.numpy() for path, weight in model.named_parameters()}
  return name, folder, said


def test_golden_files_are_what_transformers_says(case):
  name, folder, said = case
  kept = golden.FOLDER / name
  if os.environ.get("LLMJAX_WRITE_GOLDEN"):
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    shutil.copy(folder / "model.safetensors", kept)
    config = json.loads((folder / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    np.savez_compressed(kept / "said.npz", **said)
  assert (kept / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
  for key, text in json.loads((kept / "config.json").read_text()).items():
    assert json.loads((folder / "config.json").read_text())[key] == text, key
  committed = np.load(kept / "said.npz")
  assert set(committed.files) == set(said)
  for key, want in said.items():
    # The same fp32 program on another machine's kernels: rounding of short sums.
    np.testing.assert_allclose(committed[key], want, rtol=1e-4, atol=ATOL, err_msg=key)


def test_our_logits_equal_theirs(case):
  name, folder, said = case
  ours = golden.our_logits(hf.load_folder(folder), name)
  np.testing.assert_allclose(ours, said["logits"], atol=ATOL)


def _reload(folder, name):
  """transformers' model of a folder of ours; nothing may be missing or left over but BERT's pooler,
  which models with a masked-token head do not have."""
  model_class = getattr(transformers, golden.CASES[name][0])
  model, told = model_class.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
  )
  assert not told["missing_keys"]
  assert not told["mismatched_keys"]
  assert not [key for key in told["unexpected_keys"] if "pooler" not in key]
  return model.eval()


def test_an_exported_folder_says_the_same_in_transformers(case, tmp_path):
  name, folder, said = case
  family = json.loads((folder / "config.json").read_text())["model_type"]
  hf.save_folder(hf.load_folder(folder), tmp_path, family=family)
  np.testing.assert_allclose(_say(_reload(tmp_path, name), name), said["logits"], atol=ATOL)


def test_a_fresh_model_says_the_same_in_transformers(case, tmp_path):
  name, folder, _ = case
  config = hf.load_folder(folder).config
  fresh = jax.jit(lambda: build(jax.random.key(3), config))()
  rng = np.random.default_rng(5)
  moved = tree.map_with_path(
    lambda path, leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), fresh
  )
  model = Model(config, moved)
  family = json.loads((folder / "config.json").read_text())["model_type"]
  hf.save_folder(model, tmp_path, family=family)
  theirs = _say(_reload(tmp_path, name), name)
  np.testing.assert_allclose(theirs, golden.our_logits(model, name), atol=ATOL)


def test_the_text_model_comes_out_of_a_gemma_3_with_images(tmp_path, capsys):
  _, text = golden.CASES["gemma3"]
  vision = golden.cases.VISION | {"model_type": "siglip_vision_model"}
  config = transformers.Gemma3Config(
    text_config=transformers.Gemma3TextConfig(**text).to_dict(), vision_config=vision
  )
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  model.save_pretrained(tmp_path)
  ours = golden.our_logits(hf.load_folder(tmp_path), "gemma3")
  np.testing.assert_allclose(ours, _say(model, "gemma3"), atol=ATOL)
  assert "have no place in llmjax and are left out" in capsys.readouterr().err


def test_a_t5_with_a_head_of_its_own_keeps_it_in_transformers(tmp_path):
  tied = hf.load_folder(golden.FOLDER / "t5_gated").config
  config = dataclasses.replace(tied, tie_embeddings=False)
  model = Model(config, jax.jit(lambda: build(jax.random.key(3), config))())
  hf.save_folder(model, tmp_path)
  theirs = _say(_reload(tmp_path, "t5"), "t5")
  np.testing.assert_allclose(theirs, golden.our_logits(model, "t5"), atol=ATOL)
  assert not hf.load_folder(tmp_path).config.tie_embeddings


STATES = ("llama", "gpt2", "gemma2", "gpt_neox", "bert", "deepseek_v3", "olmo2", "phi3", "qwen3")


@pytest.mark.parametrize("case", STATES, indirect=True)
def test_states_of_layers_and_attention_are_theirs(case):
  name, folder, _ = case
  given = golden.inputs(name)
  theirs = _reload(folder, name)(
    **{key: torch.from_numpy(array) for key, array in given.items()},
    output_hidden_states=True, output_attentions=True,
  )
  model, batch = hf.load_folder(folder).parameters, golden.our_batch(given)
  real = given.get("attention_mask", np.ones_like(given["input_ids"])) > 0
  states = np.stack([state.detach().numpy() for state in theirs.hidden_states[:-1]])
  ours = np.asarray(hidden_states(model, batch, range(model.config.layers)))
  # Theirs are scaled by the embedding's factor as ours, and not normed but for the last.
  np.testing.assert_allclose(ours[:, real], states[:, real], atol=ATOL * np.abs(states).max())
  maps = np.stack([each.detach().numpy() for each in theirs.attentions]).swapaxes(2, 3)
  found = np.asarray(attention_maps(model, batch)).swapaxes(2, 3)
  np.testing.assert_allclose(found[:, real], maps[:, real], atol=ATOL)
