"""Architectures at their published sizes: the values of their `config.json` give the parameters
that their makers state, with experts in all and of one token, without an array being made.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.core.config import defaults, editable, freeze
from llmjax.core.errors import UserError
from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.family import misfits
from llmjax.formats.presets import PRESETS, preset
from llmjax.models.build import count_parameters
from llmjax.models.formulas import cache_bytes_per_token, forward_flops_per_token
from llmjax.training.config import Config
from tests import golden
from tests.models.counts import parameters

# name → billions of parameters, and of those used for a token; as their cards state.
PUBLISHED = {
  "Mixtral-8x7B": (46.7, 12.9),
  "Qwen3-30B-A3B": (30.5, 3.3),
  "Qwen3-235B-A22B": (235, 22),
  "OLMoE-1B-7B": (6.9, 1.3),
  "DeepSeek-V2-Lite": (15.7, 2.66),  # their 2.4 leaves out the embedding
  "DeepSeek-V2": (236, 21),
  "DeepSeek-V3": (671, 37),
}


# The weights that their makers give away.
DENSE = {
  "Llama-2-7B": 6_738_415_616,
  "Llama-3-8B": 8_030_261_248,
  "Llama-3-70B": 70_553_706_496,
  "Llama-3-405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", DENSE)
def test_parameters_of_a_dense_model_are_those_of_its_published_weights(name):
  config = preset(name)
  assert parameters(config) == count_parameters(config) == DENSE[name]
  assert not misfits(hf.family_of(PRESETS[name]), config)


def test_llama_2_and_3_differ_in_heads_base_and_stretch():
  old, new, long = (preset(f"Llama-{size}") for size in ("2-7B", "3-8B", "3-405B"))
  assert (old.dims["k"], new.dims["k"], long.dims["k"]) == (32, 8, 8)
  assert (old.position.theta, new.position.theta) == (1e4, 5e5)
  assert (old.max_seq_len, new.max_seq_len, long.max_seq_len) == (4096, 8192, 131_072)
  assert (new.position.scaling, long.position.scaling) == ("none", "llama3")
  assert (long.position.factor, long.position.original_context) == (8.0, 8192)
  assert long.max_seq_len == 16 * long.position.original_context
  assert not (old.tie_embeddings or new.tie_embeddings or long.tie_embeddings)


def test_every_preset_is_held_to_what_its_maker_states():
  assert sorted({**PUBLISHED, **DENSE}) == sorted(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name):
  (billions, active), config = PUBLISHED[name], preset(name)
  assert parameters(config) == count_parameters(config)
  digits = 1 if billions < 100 else 0
  assert round(parameters(config) / 1e9, digits) == billions
  assert not misfits(hf.family_of(PRESETS[name]), config)
  # One token alone sees itself: no more than 1 % of the products are not with weights.
  used = forward_flops_per_token(config, 1) / 2 + config.vocab_size * config.width
  assert used / 1e9 == pytest.approx(active, rel=0.03)


def test_a_layer_that_predicts_further_tokens_is_left_out_and_told(tmp_path, capsys):
  shutil.copytree(golden.FOLDER / "deepseek_v3", tmp_path, dirs_exist_ok=True)
  theirs = json.loads((tmp_path / "config.json").read_text())
  assert (theirs["num_nextn_predict_layers"], theirs["num_hidden_layers"]) == (1, 2)
  path = tmp_path / "model.safetensors"
  tensors = load_file(path)
  for layer, fine in ((2, True), (3, False)):
    tensors[f"model.layers.{layer}.eh_proj.weight"] = np.ones((16, 32), np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    if fine:
      hf.load_folder(tmp_path)
      assert "to predict further tokens, is left out" in capsys.readouterr().err
    else:
      with pytest.raises(UserError, match=r"1 tensors have no place.*layers\.3\.eh_proj"):
        hf.load_folder(tmp_path)


def test_a_latent_cache_is_a_fraction_of_that_of_heads():
  config = preset("DeepSeek-V3")
  assert cache_bytes_per_token(config) == 61 * (512 + 64) * 2  # 70 kB; with 128 heads it were 4 MB


@pytest.mark.parametrize(
  ("name", "values", "message"),
  [
    ("Qwen3-30B-A3B", {"mlp_only_layers": [3]}, r"mlp_only_layers=\[3\] is not supported"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
    ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ("DeepSeek-V3", {"num_key_value_heads": 8}, "latent attention decides heads itself"),
    ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
  ],
)
def test_what_a_family_does_not_say_is_refused(name, values, message):
  theirs = PRESETS[name] | values
  with pytest.raises(UserError, match=message):
    hf.read_config(hf.family_of(theirs), theirs)


def test_a_preset_is_taken_over_in_a_config_file_and_a_wrong_name_gets_its_neighbour():
  config = defaults(Config)
  config.model = editable(preset("Mixtral-8x7B"))
  config.model.layers = 2
  assert freeze(config.to_dict(), Config).model.moe.experts == 8
  with pytest.raises(UserError, match=r"unknown preset 'Mixtral-7x8B'; .*'Mixtral-8x7B'"):
    preset("Mixtral-7x8B")
