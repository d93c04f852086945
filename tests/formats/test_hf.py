"""Hugging Face folders of every family: what transformers said of them (golden), and back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.tasks import language_model
from llmjax.formats.hf import files as hf_files
from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.canonical import canonical
from llmjax.formats.hf.decoders import LLAMA
from llmjax.formats.hf.layout import from_tensors
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from llmjax.training.stored import save_model
from tests import golden
from tests.gradients import loss_and_grad

pytestmark = pytest.mark.usefixtures("quick_compile")


def family_of(name) -> str:
  return json.loads((golden.FOLDER / name / "config.json").read_text())["model_type"]


@pytest.fixture(scope="module", params=golden.CASES)
def case(request):
  """(name, our model of its golden folder)."""
  return request.param, hf.load_folder(golden.FOLDER / request.param)


@pytest.fixture(scope="module")
def llama():
  return llmjax.load(golden.FOLDER / "llama")


def same(ours, theirs):
  """Whether two trees of weights are equal to the bit."""
  ours, theirs = tree.flatten(ours), tree.flatten(theirs)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_logits_equal_those_of_transformers(case):
  name, model = case
  said = np.load(golden.FOLDER / name / "said.npz")
  # fp32 on both sides, logits of order 1 to 10: rounding over a few layers stays within 1e-4.
  np.testing.assert_allclose(golden.our_logits(model, name), said["logits"], atol=1e-4)


def test_writing_and_reading_gives_every_bit_back(case, tmp_path):
  name, model = case
  hf.save_folder(model, tmp_path, family=family_of(name))
  again = hf.load_folder(tmp_path)
  assert canonical(again.config) == canonical(model.config)
  same(again.parameters, model.parameters)


def test_the_tensors_written_are_those_that_were_read(case, tmp_path):
  name, model = case
  hf.save_folder(model, tmp_path, family=family_of(name))
  read = {
    _usual(key): array
    for key, array in load_file(golden.FOLDER / name / "model.safetensors").items()
  }
  written = {_usual(key): array for key, array in load_file(tmp_path / "model.safetensors").items()}
  # BERT's pooler is ours alone; LLaVA's last layer and last norm are read by nobody, and Marian's
  # sinusoids are what every reader computes.
  ours = {key for key in written if "pooler" in key}
  unread = {key for key in read if ".layers.2." in key and "vision_tower" in key}
  unread |= {key for key in read if "embed_positions" in key}
  assert written.keys() - ours == read.keys() - unread
  for key in read.keys() - unread:
    if key == "roberta.embeddings.position_embeddings.weight":
      written[key], read[key] = written[key][2:], read[key][2:]  # no position has the first two
    if "post_layernorm" not in key:
      np.testing.assert_allclose(written[key], read[key], atol=1e-7, err_msg=key)


def _usual(name):
  name = name.replace("vision_tower.vision_model.", "vision_tower.")
  return name.replace("model.shared.", "model.decoder.embed_tokens.")


def test_loss_and_every_gradient_equal_those_of_transformers(llama):
  said = np.load(golden.FOLDER / "llama" / "said.npz")
  ids = golden.token_ids()
  batch = language_model(ids, np.ones_like(ids))
  loss, grads, count, _ = jax.jit(loss_and_grad)(llama.parameters, batch)
  assert count == 32
  np.testing.assert_allclose(loss, said["loss"], rtol=1e-5)
  theirs = {name.removeprefix("grad."): said[name] for name in said.files if "grad." in name}
  want = tree.flatten(from_tensors(llama.config, theirs, LLAMA.tensors))
  got = tree.flatten(grads)
  assert got.keys() == want.keys()
  for path, grad in got.items():
    scale = np.abs(want[path]).max()
    # fp32 backward through two layers; gradients of order 1e-2.
    np.testing.assert_allclose(grad, want[path], atol=1e-4 * scale, err_msg=path)


@pytest.fixture
def folder(tmp_path):
  """A copy of the golden Llama to be spoilt, and a function that changes its config."""
  for file in (golden.FOLDER / "llama").iterdir():
    shutil.copy(file, tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())

  def edited(**values):
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    return tmp_path

  return edited


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model_type": "gpt9"}, "model_type 'gpt9' is not one of llmjax's"),
    ({"num_hidden_layers": 3}, r"model\.layers\.2\..*is missing"),
    ({"num_hidden_layers": 1}, "9 tensors have no place in the model: model.layers.1"),
    ({"vocab_size": 38}, r"has shape \(37, 16\), which is not vd = \(38, 16\)"),
    ({"hidden_act": "xielu"}, "llama with hidden_act='xielu' is not supported; known: 'silu'"),
    ({"hidden_size": None}, "has no 'hidden_size'"),
    ({"hidden_size": "wide"}, "'model.width' must be int, not 'wide'"),
    ({"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported; known: def"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' has no 'short_factor'"),
    ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' has no 'factor'"),
    (
      {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
      "rope type 'yarn' beside 'linear' is not supported",
    ),
    (
      {"rope_scaling": {"type": "yarn", "factor": "4"}},
      "rope type 'yarn' with factor='4' is not supported",
    ),
    (
      {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
      "rope type 'yarn' with truncate=False is not supported",
    ),
    ({"rope_scaling": [4.0]}, r"rope parameters are a table of values, not \[4.0\]"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, "has layers of several sizes"),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "slope": 1}},
      "rope type 'linear' with 'slope' is not supported",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ({"quantization_config": {"bits": 4}}, "is quantized"),
  ],
)
def test_a_config_that_does_not_fit_is_told_in_one_sentence(folder, values, message):
  with pytest.raises(UserError, match=message):
    llmjax.load(folder(**values))


def test_damaged_files_are_told_in_one_sentence(folder):
  path = folder()
  weights = path / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-100])
  with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors"):
    llmjax.load(path)
  weights.unlink()
  with pytest.raises(UserError, match="no safetensors"):
    llmjax.load(path)
  (path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match=r"pytorch_model\.bin, which can run code"):
    llmjax.load(path)
  (path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json is not JSON"):
    llmjax.load(path)


def test_unknown_keys_are_named(folder, capsys):
  llmjax.load(folder(surprise=1))
  assert "does not know and leaves out: surprise" in capsys.readouterr().err


def _rewrite(path, change):
  tensors = change(load_file(path / "model.safetensors"))
  save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
  return hf.load_folder(path)


def test_other_spellings_copies_and_buffers_load_alike(folder, llama):
  path = folder()
  made = _rewrite(
    path,
    lambda tensors: {name.removeprefix("model."): array for name, array in tensors.items()}
    | {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)},
  )
  same(made.parameters, llama.parameters)


def test_shards_with_an_index_load_and_are_written(folder, llama, monkeypatch, tmp_path):
  monkeypatch.setattr(hf_files, "SHARD_BYTES", 4096)
  out = tmp_path / "shards"
  hf.save_folder(llama, out)
  assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
  same(hf.load_folder(out).parameters, llama.parameters)
  next(out.glob("model-*.safetensors")).unlink()
  with pytest.raises(UserError, match="which is not there"):
    hf.load_folder(out)


def test_bfloat16_folders_round_once(llama, tmp_path):
  hf.save_folder(llama, tmp_path, dtype="bfloat16")
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
  once = hf.load_folder(tmp_path)
  for path, leaf in tree.flatten(once.parameters).items():
    want = tree.flatten(llama.parameters)[path]
    np.testing.assert_array_equal(leaf, want.astype("bfloat16").astype("float32"), err_msg=path)
  with pytest.raises(UserError, match="dtype 'int8' is unknown"):
    hf.save_folder(llama, tmp_path, dtype="int8")


def test_a_tied_head_may_be_there_as_a_copy_and_unties_when_it_differs(tmp_path, capsys):
  shutil.copytree(golden.FOLDER / "llama_biases", tmp_path, dirs_exist_ok=True)
  embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
  copied = _rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding})
  assert copied.config.tie_embeddings
  other = _rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
  assert not other.config.tie_embeddings
  assert "differs from the embedding" in capsys.readouterr().err


def test_an_encoder_without_a_head_gets_a_plain_one(tmp_path, capsys):
  shutil.copytree(golden.FOLDER / "bert", tmp_path, dirs_exist_ok=True)
  whole = hf.load_folder(golden.FOLDER / "bert")

  def headless(tensors):
    return {
      name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): array
      for name, array in tensors.items()
      if "cls." not in name
    }

  made = _rewrite(tmp_path, headless)
  assert "transform" in capsys.readouterr().err
  same(made.parameters.encoder, whole.parameters.encoder)
  np.testing.assert_array_equal(made.parameters.transform_id, np.eye(16))


@pytest.mark.parametrize(
  ("family", "values"),
  [
    ("phi3", {"position": PositionConfig(layout="interleaved", fraction=0.5)}),
    ("qwen2", {"attention": AttentionConfig(bias="qkv")}),
    ("qwen3", {"attention": AttentionConfig(qk_norm="head")}),
    ("olmo2", {"attention": AttentionConfig(qk_norm="all"), "norm": NormConfig(place="output")}),
  ],
)
def test_interleaved_positions_are_exported_in_half_layout(tmp_path, family, values):
  values = {"position": PositionConfig(layout="interleaved")} | values
  config = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24, vocab_size=37,
    max_seq_len=32, dtype="float32", scan=True, **values,
  )
  model = Model(config, _moved(config))
  assert hf.choose(config).name == family
  hf.save_folder(model, tmp_path)
  half = hf.load_folder(tmp_path)
  assert half.config.position.layout == "half"
  ids = golden.token_ids()
  # The same products in another order: fp32 rounding.
  np.testing.assert_allclose(half.logits(ids), model.logits(ids), atol=1e-4)


def _moved(config):
  """Random weights, none at its initial value; NumPy's, since no generator is compiled."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), abstract(config)
  )


def older(config: dict) -> dict:
  """A config.json in the words that transformers wrote before version 5."""
  config = {key: value for key, value in config.items() if key != "layer_types"}
  rope = config.pop("rope_parameters", None)
  if rope is None:
    return config
  windows = "full_attention" in rope
  if windows:
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope["full_attention"]
  rope = dict(rope)
  theta, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
  if config["model_type"] == "gpt_neox":
    return config | {"rotary_emb_base": theta, "rotary_pct": share}
  config["rope_theta"] = theta
  if share is not None:
    config["partial_rotary_factor"] = share
  kind = rope.pop("rope_type")
  rope["rope_type" if windows else "type"] = kind  # Gemma 3 came after the shorter word
  return config | ({} if kind == "default" else {"rope_scaling": rope})


def test_older_words_mean_the_same(case):
  name, model = case
  theirs = json.loads((golden.FOLDER / name / "config.json").read_text())
  assert hf.read_config(hf.family_of(theirs), older(theirs)) == model.config


def test_static_ntk_is_written_as_the_base_it_amounts_to(tmp_path):
  position = PositionConfig(scaling="ntk", factor=3.0)
  config = ModelConfig(
    layers=1, width=16, heads=2, mlp_width=24, vocab_size=37, max_seq_len=32, dtype="float32",
    position=position,
  )
  model = Model(config, _moved(config))
  hf.save_folder(model, tmp_path)
  again = hf.load_folder(tmp_path)
  assert again.config.position.theta > 20_000
  ids = golden.token_ids()
  # The same angles by another formula: fp32 rounding.
  np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-4)


def test_known_folders_leave_no_key_unread(case, capsys):
  hf.load_folder(golden.FOLDER / case[0])
  told = capsys.readouterr().err
  assert "keys that llmjax does not know" not in told, told


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"position": PositionConfig(kind="alibi")}, "position.kind"),
    ({"block": "parallel"}, "its block is 'sequential', not 'parallel'"),
    ({"attention": AttentionConfig(sinks=True)}, "its attention.sinks is False, not True"),
    ({"norm": NormConfig(eps=1e-5, place="post")}, "its norm.place is 'pre', not 'post'"),
  ],
)
def test_an_architecture_of_no_family_is_told_with_the_nearest(tiny_config, values, message):
  config = ModelConfig(**(vars(tiny_config) | values))
  with pytest.raises(UserError, match=f"no family of transformers holds.*nearest.*{message}"):
    hf.choose(config)


def test_a_model_without_a_tokenizer_says_so(tmp_path, capsys):
  folder = shutil.copytree(golden.FOLDER / "llama", tmp_path / "llama")
  assert hf.load_folder(folder).tokenizer is None
  assert capsys.readouterr().err.count("note: the model has no tokenizer: ") == 1
  (folder / "spiece.model").write_bytes(b"no model")  # one that is refused leaves the weights
  assert hf.load_folder(folder).tokenizer is None
  told = capsys.readouterr().err
  assert "no tokenizer: tokenizer file" in told and "not a SentencePiece model" in told
  save_model(hf.load_folder(folder), tmp_path / "checkpoint")
  capsys.readouterr()
  llmjax.load(tmp_path / "checkpoint")
  assert capsys.readouterr().err.count("note: the checkpoint holds no tokenizer") == 1
