"""Every architecture's GGUF file gives the model it was written from.

Tensor names come from the `gguf` package's own map of transformers' names; what llama.cpp's
converter does to a tensor on the way is done here by hand.
"""

import dataclasses
import json
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmjax
from llmjax.core import tree
from llmjax.data.batch import Batch
from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.canonical import canonical
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.norm import NormConfig
from llmjax.nn.position import PositionConfig
from tests.gguf_files import IDS, write

pytestmark = pytest.mark.usefixtures("quick_compile")

BASE = ModelConfig(
  layers=2, width=24, heads=4, kv_heads=2, head_dim=8, mlp_width=40, vocab_size=61, max_seq_len=32,
  norm=NormConfig(eps=1e-6), dtype="float32",
)
LAYER = NormConfig(kind="layer", bias=True)
GEMMA = dataclasses.replace(
  BASE,
  activation="geglu_tanh",
  norm=NormConfig(place="sandwich", eps=1e-6),
  embed=EmbedConfig(scale=math.sqrt(24)),
)
# GGUF's name → (transformers' name, architecture)
CASES = {
  "qwen2": ("qwen2", dataclasses.replace(BASE, head_dim=6, attention=AttentionConfig(bias="qkv"))),
  "qwen3": ("qwen3", dataclasses.replace(BASE, attention=AttentionConfig(qk_norm="head"))),
  "olmo2": (
    "olmo2",
    dataclasses.replace(
      BASE,
      head_dim=6,
      attention=AttentionConfig(qk_norm="all"),
      norm=NormConfig(place="output", eps=1e-6),
      tie_embeddings=False,
    ),
  ),
  "gemma2": (
    "gemma2",
    dataclasses.replace(
      GEMMA,
      attention=AttentionConfig(pattern=("window", "full"), window=5, softcap=20.0),
      embed=EmbedConfig(scale=math.sqrt(24), logit_softcap=10.0),
    ),
  ),
  "gemma3": (
    "gemma3_text",
    dataclasses.replace(
      GEMMA,
      layers=7,
      attention=AttentionConfig(
        pattern=("window",) * 5 + ("full",), window=5, qk_norm="head"
      ),
      position=PositionConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0),
    ),
  ),
  "gpt2": (
    "gpt2",
    dataclasses.replace(
      BASE,
      kv_heads=4,
      head_dim=6,
      activation="gelu_tanh",
      mlp_bias=True,
      attention=AttentionConfig(bias="all"),
      position=PositionConfig(kind="learned"),
      norm=LAYER,
    ),
  ),
  "phi3": (
    "phi3",
    dataclasses.replace(
      BASE,
      head_dim=6,
      tie_embeddings=False,
      attention=AttentionConfig(pattern=("window",), window=6),
    ),
  ),
  "bert": (
    "bert",
    dataclasses.replace(
      BASE,
      kind="encoder",
      kv_heads=4,
      head_dim=6,
      activation="gelu",
      mlp_bias=True,
      attention=AttentionConfig(bias="all"),
      position=PositionConfig(kind="learned"),
      norm=dataclasses.replace(LAYER, place="post"),
      embed=EmbedConfig(types=2, norm=True, head_bias=True),
    ),
  ),
}


def random_model(config) -> Model:
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    array = rng.normal(size=leaf.shape) * 0.3 + path.rsplit("/", 1)[-1].startswith("scale")
    return jnp.asarray(array, jnp.float32)

  return Model(config, tree.map_with_path(draw, abstract(config)))


def metadata(arch: str, config: ModelConfig) -> dict:
  """The keys that llama.cpp's converter writes."""
  dims, attention = config.dims, config.attention
  rms = "_rms" if config.norm.kind == "rms" else ""
  keys = {
    "block_count": config.layers,
    "context_length": config.max_seq_len,
    "embedding_length": config.width,
    "feed_forward_length": config.mlp_width,
    "attention.head_count": dims["n"],
    f"attention.layer_norm{rms}_epsilon": config.norm.eps,
  }
  if config.position.kind == "rope":
    keys["attention.head_count_kv"] = dims["k"]
    keys["rope.freq_base"] = config.position.theta
  if arch in ("qwen3", "gemma2", "gemma3"):
    keys |= {"attention.key_length": dims["h"], "attention.value_length": dims["h"]}
  if arch == "phi3":
    keys["rope.dimension_count"] = dims["h"]
  if attention.window:
    keys["attention.sliding_window"] = attention.window
  if attention.softcap:
    keys["attn_logit_softcapping"] = attention.softcap
    keys["final_logit_softcapping"] = config.embed.logit_softcap
  if config.position.scaling == "linear":
    keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.position.factor}
  return {f"{arch}.{key}": value for key, value in keys.items()}


def tensors(arch: str, folder, layers: int) -> dict:
  """A folder's tensors as the converter writes them."""
  names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), layers)
  made = {}
  for name, array in load_file(folder / "model.safetensors").items():
    if arch == "bert" and name.startswith(("cls.", "bert.pooler.")):
      continue  # it leaves heads out
    if arch == "gpt2" and ".c_" in name and name.endswith("weight"):
      array = np.ascontiguousarray(array.T)  # Conv1D keeps the other order
    if arch.startswith("gemma") and "norm" in name:
      array = array + 1
    short = name.removeprefix("bert.") if arch == "bert" else name
    made[names.get_name(short, try_suffixes=(".weight", ".bias"))] = array
  return made


# What files of encoders leave out.
ABSENT = ("transform", "pooler", "embed/head_bias_v")
# Equal configs and weights are equal models; of these two the logits are compared as well.
FORWARD = ("gemma3", "bert")


@jax.jit
def last_hidden(model, tokens):
  if hasattr(model, "features"):
    return model.features(Batch(tokens))
  return model.logits(model.hidden(Batch(tokens))[0])


@pytest.mark.parametrize("arch", CASES)
def test_a_file_gives_the_config_and_weights_of_its_model(arch, tmp_path):
  family, config = CASES[arch]
  model = random_model(config)
  hf.save_folder(model, tmp_path / "hf", family=family)
  written = tensors(arch, tmp_path / "hf", config.layers)
  assert None not in written
  write(tmp_path / "a.gguf", arch, metadata(arch, config), written)
  found = llmjax.load(tmp_path / "a.gguf")
  assert canonical(found.config) == canonical(config)
  weights, want = tree.flatten(found.parameters), tree.flatten(model.parameters)
  assert weights.keys() == want.keys()
  for path in want:
    if not path.startswith(ABSENT):
      # Of order 1, after -1 + 1 in fp32 where it is a norm's scale.
      np.testing.assert_allclose(weights[path], want[path], atol=1e-6, err_msg=path)
  if arch not in FORWARD:
    return
  ids = IDS.astype(np.int32)
  want = last_hidden(model.parameters, ids)
  # The same fp32 arithmetic on the same numbers; a norm's scale went through -1 + 1.
  np.testing.assert_allclose(
    last_hidden(found.parameters, ids), want, atol=1e-4 * np.abs(want).max()
  )
  assert np.std(want) > 0.1


def test_gemmas_of_one_size_scale_their_scores_otherwise(tmp_path):
  _, config = CASES["gemma2"]
  embed = dataclasses.replace(config.embed, scale=math.sqrt(8))
  config = dataclasses.replace(config, layers=46, width=8, mlp_width=8, embed=embed)
  hf.save_folder(random_model(config), tmp_path / "hf", family="gemma2")
  written = tensors("gemma2", tmp_path / "hf", 46)
  write(tmp_path / "a.gguf", "gemma2", metadata("gemma2", config), written)
  assert llmjax.load(tmp_path / "a.gguf").config.attention.scale == (8 / 4) ** -0.5


def test_the_config_written_for_a_family_is_the_one_meant(tmp_path):
  """Guards the cases above: transformers' family holds each of them."""
  for family, config in CASES.values():
    assert not hf.misfits(hf.FAMILIES[family], config), json.dumps(dataclasses.asdict(config))
