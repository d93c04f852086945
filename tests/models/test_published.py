"""Families with experts at their published sizes: the values of their `config.json` give the
parameters that their makers state, in all and of one token, without an array being made.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.core.errors import UserError
from llmjax.models import hf
from llmjax.models.build import count_parameters
from llmjax.models.formulas import cache_bytes_per_token, forward_flops_per_token
from llmjax.models.hf_family import misfits
from tests import golden
from tests.models.counts import parameters


def _yarn(mscale):
  return {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
  }


def _config(model_type, layers, width, heads, vocab, mlp, theta, **more):
  return {
    "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width,
    "num_attention_heads": heads, "vocab_size": vocab, "intermediate_size": mlp,
    "rope_theta": theta, "hidden_act": "silu", "tie_word_embeddings": False, **more,
  }


LATENT = {
  "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
  "max_position_embeddings": 163_840, "rms_norm_eps": 1e-6, "attention_bias": False,
  "moe_layer_freq": 1,
}
V2 = LATENT | {
  "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
  "norm_topk_prob": False, "scoring_func": "softmax", "rope_scaling": _yarn(0.707),
}
# name → (config.json, billions of parameters, of them used for a token); as their cards state.
PUBLISHED = {
  "Mixtral-8x7B": (
    _config(
      "mixtral", 32, 4096, 32, 32_000, 14_336, 1e6, num_key_value_heads=8, num_local_experts=8,
      num_experts_per_tok=2, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=None,
    ), 46.7, 12.9,
  ),
  "Qwen3-30B-A3B": (
    _config(
      "qwen3_moe", 48, 2048, 32, 151_936, 6144, 1e6, num_key_value_heads=4, head_dim=128,
      num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
      decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=40_960, rms_norm_eps=1e-6,
      max_window_layers=48, use_sliding_window=False, sliding_window=None, attention_bias=False,
    ), 30.5, 3.3,
  ),
  "OLMoE-1B-7B": (
    _config(
      "olmoe", 16, 2048, 16, 50_304, 1024, 10_000, num_key_value_heads=16, num_experts=64,
      num_experts_per_tok=8, norm_topk_prob=False, max_position_embeddings=4096, rms_norm_eps=1e-5,
      clip_qkv=None, attention_bias=False,
    ), 6.9, 1.3,
  ),
  "DeepSeek-V2-Lite": (
    _config(
      "deepseek_v2", 27, 2048, 16, 102_400, 10_944, 10_000, **V2, num_key_value_heads=16,
      q_lora_rank=None, n_routed_experts=64, moe_intermediate_size=1408, topk_method="greedy",
      n_group=1, topk_group=1, routed_scaling_factor=1.0,
    ), 15.7, 2.66,  # their 2.4 leaves out the embedding
  ),
  "DeepSeek-V2": (
    _config(
      "deepseek_v2", 60, 5120, 128, 102_400, 12_288, 10_000, **V2, num_key_value_heads=128,
      q_lora_rank=1536, n_routed_experts=160, moe_intermediate_size=1536,
      topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
    ), 236, 21,
  ),
  "DeepSeek-V3": (
    _config(
      "deepseek_v3", 61, 7168, 128, 129_280, 18_432, 10_000, **LATENT, num_key_value_heads=128,
      q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
      moe_intermediate_size=2048, first_k_dense_replace=3, norm_topk_prob=True, n_group=8,
      topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=2.5,
      rope_scaling=_yarn(1.0), num_nextn_predict_layers=1,
    ), 671, 37,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name):
  theirs, billions, active = PUBLISHED[name]
  config = hf.read_config(hf.family_of(theirs), theirs)
  assert parameters(config) == count_parameters(config)
  digits = 1 if billions < 100 else 0
  assert round(parameters(config) / 1e9, digits) == billions
  assert not misfits(hf.family_of(theirs), config)
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
  config = hf.read_config(hf.family_of(PUBLISHED["DeepSeek-V3"][0]), PUBLISHED["DeepSeek-V3"][0])
  assert cache_bytes_per_token(config) == 61 * (512 + 64) * 2  # 70 kB; with 128 heads it were 4 MB


@pytest.mark.parametrize(
  ("name", "values", "message"),
  [
    ("Qwen3-30B-A3B", {"mlp_only_layers": [3]}, r"mlp_only_layers=\[3\] is not supported"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
    ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ("DeepSeek-V3", {"num_key_value_heads": 8}, "num_key_value_heads=8 is not 128"),
    ("DeepSeek-V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported"),
    ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
  ],
)
def test_what_a_family_does_not_say_is_refused(name, values, message):
  theirs = PUBLISHED[name][0] | values
  with pytest.raises(UserError, match=message):
    hf.read_config(hf.family_of(theirs), theirs)
