"""Keys of GGUF files mean what llama.cpp takes them for, those that are missing as well.

The numbers are those of `load_hparams` in llama.cpp's src/llama-model.cpp and src/models, of the
defaults in src/llama-hparams.h, and of the YaRN factors in src/llama-context.cpp.
"""

import math

import numpy as np
import pytest

import llmjax
from llmjax.core.errors import UserError
from llmjax.formats.gguf.config import config_of
from llmjax.nn.position import rope_frequencies

LAYER = ("bert", "gpt2")  # the architectures of layer norms; the others have RMS norms
WINDOWS = ("window", "full")


def read(arch="llama", missing=(), factors=(), **keys):
  """The config of a file of six layers and four heads, with these keys (`__` is a dot)."""
  values = {
    "block_count": 6, "context_length": 32, "embedding_length": 24, "feed_forward_length": 40,
    "attention.head_count": 4,
    f"attention.layer_norm{'' if arch in LAYER else '_rms'}_epsilon": 1e-6,
  }
  values |= {key.replace("__", "."): value for key, value in keys.items()}
  named = {f"{arch}.{key}": value for key, value in values.items() if key not in missing}
  shapes = {"token_embd.weight": (61, 24), "blk.0.attn_norm.weight": (24,)}
  if arch in LAYER:
    shapes["position_embd.weight"] = (32, 24)
  return config_of({"general.architecture": arch} | named, shapes, dict(factors))


def scaled(**keys):
  position = read(**{f"rope__{key}": value for key, value in keys.items()}).position
  return position.scaling, position.factor


@pytest.mark.parametrize(
  ("keys", "want"),
  [
    ({"scale_linear": 4.0}, ("linear", 4)),
    ({"scaling__factor": 4.0}, ("linear", 4)),
    ({"scaling__factor": 4}, ("linear", 4)),
    ({"scaling__factor": 8.0, "scale_linear": 2.0}, ("linear", 8)),  # the older name comes second
    ({"scaling__factor": 0.0, "scaling__type": "linear"}, ("none", 1)),  # 0 stands for none
    ({"scaling__factor": 1.0, "scaling__type": "yarn"}, ("none", 1)),
    ({"scaling__factor": 4.0, "scaling__type": "none"}, ("none", 1)),
    ({"scaling__factor": 4.0, "scaling__type": "yarn"}, ("yarn", 4)),
    ({"freq_base": 500000.0}, ("none", 1)),
  ],
)
def test_a_scaling_without_a_type_is_linear(keys, want):
  assert scaled(**keys) == want


@pytest.mark.parametrize(
  ("name", "factor"), [("scale_linear", 4), ("factor_only", 4), ("plain", 1)]
)
def test_a_real_file_with_either_key_turns_four_times_as_slowly(name, factor, shared_data):
  model = llmjax.load(shared_data.parent / "cases" / "gguf_rope_keys" / f"{name}.gguf")
  angles = rope_frequencies(model.config.position, 8)
  np.testing.assert_allclose(angles, 10_000.0 ** (-np.arange(0, 8, 2) / 8) / factor, rtol=1e-12)
  assert model.config.max_seq_len == 32 * factor


def test_what_yarn_leaves_out():
  keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
  position = read(**keys).position
  assert (position.original_context, position.beta_fast, position.beta_slow) == (32, 32, 1)
  assert position.attention_factor == pytest.approx(1.138629436)  # 0.1 ln 4 + 1
  keys |= {"rope__scaling__attn_factor": 0.5, "rope__scaling__yarn_beta_fast": 16.0}
  position = read(**keys, rope__scaling__original_context_length=8).position
  assert (position.original_context, position.beta_fast) == (8, 16)
  assert position.attention_factor == pytest.approx(0.5 * 1.138629436)


def test_longrope_is_two_tensors():
  """Phi-3.5's files give no type and no factor: llama.cpp goes by the tensors."""
  factors = {"rope_factors_short.weight": [1.0, 1.5, 2.0], "rope_factors_long.weight": [2, 4, 8]}
  keys = {"rope__scaling__original_context_length": 8, "rope__scaling__attn_factor": 1.19}
  config = read("phi3", factors={name: np.array(each) for name, each in factors.items()}, **keys)
  position = config.position
  assert (position.scaling, position.original_context, config.max_seq_len) == ("longrope", 8, 32)
  assert position.divisors == (1, 1.5, 2, 2, 4, 8) and position.amplitude == 1.19
  plain = read("phi3", factors={name: np.array(each) for name, each in factors.items()}).position
  assert (plain.original_context, plain.amplitude) == (32, 1)


@pytest.mark.parametrize(
  ("keys", "context"),
  [
    ({}, 128),
    ({"original_context_length": 8}, 32),  # the file's own length is the extended one already
    ({"original_context_length": 16}, 64),
    ({"finetuned": True}, 32),
    ({"finetuned": True, "original_context_length": 32}, 128),
  ],
)
def test_the_context_is_the_extended_one(keys, context):
  keys = {f"rope__scaling__{key}": value for key, value in keys.items()}
  for kind in ("linear", "yarn"):
    config = read(rope__scaling__type=kind, rope__scaling__factor=4.0, **keys)
    assert config.max_seq_len == context
  assert read(**keys).max_seq_len == 32
  # As transformers' config gives it.
  assert read("gemma3", rope__scaling__factor=8.0).max_seq_len == 32


def windows(config):
  attention, position = config.attention, config.position
  return attention.pattern, attention.window, position.local_theta


@pytest.mark.parametrize(
  ("arch", "keys", "want"),
  [
    ("gemma2", {}, (WINDOWS, 4096, 0)),
    ("gemma2", {"attention__sliding_window": 5}, (WINDOWS, 5, 0)),
    ("gemma2", {"rope__freq_base_swa": 500.0}, (WINDOWS, 4096, 500)),
    ("gemma3", {}, (("full",), 0, 0)),
    ("gemma3", {"attention__sliding_window": 5}, (("window",) * 5 + ("full",), 5, 10_000)),
    (
      "gemma3",
      {"attention__sliding_window": 5, "rope__freq_base_swa": 500.0},
      (("window",) * 5 + ("full",), 5, 500),
    ),
    (
      "gemma3",
      {"attention__sliding_window": 5, "attention__sliding_window_pattern": 3},
      (("window", "window", "full"), 5, 10_000),
    ),
    (
      "gemma3",
      {
        "attention__sliding_window": 5,
        "attention__sliding_window_pattern": [True, False, True, False, True, False],
      },
      (WINDOWS, 5, 10_000),
    ),
    ("gemma2", {"attention__sliding_window_pattern": 1}, (("full",), 0, 0)),
    ("gemma2", {"attention__sliding_window_pattern": 0}, (("window",), 4096, 0)),
    ("olmo2", {}, (("full",), 0, 0)),
    (
      "olmo2",
      {"attention__sliding_window": 5, "rope__freq_base": 500.0, "rope__scaling__factor": 4.0},
      (("window",) * 3 + ("full",), 5, 500),
    ),
    ("phi3", {"attention__sliding_window": 5}, (("window",), 5, 0)),
    ("llama", {"rope__freq_base_swa": 500.0}, (("full",), 0, 0)),  # no layer has a window
  ],
)
def test_windows_and_their_bases(arch, keys, want):
  assert windows(read(arch, **keys)) == want


def test_scales_soft_caps_and_masks():
  gemma2 = read("gemma2")
  assert (gemma2.attention.softcap, gemma2.embed.logit_softcap) == (50, 30)
  assert gemma2.embed.scale == pytest.approx(math.sqrt(24))
  gemma2 = read("gemma2", attn_logit_softcapping=20.0, final_logit_softcapping=0.0)
  assert (gemma2.attention.softcap, gemma2.embed.logit_softcap) == (20, 0)
  assert read("gemma3").embed.logit_softcap == 0
  llama = read(attention__scale=0.25, embedding_scale=12.0, attention__causal=False)
  assert (llama.attention.scale, llama.embed.scale) == (0.25, 12)
  assert not llama.causal and read(attention__causal=True).causal
  assert read("bert", attention__causal=False).attention.mask == "auto"
  assert read("bert", attention__causal=True).causal


def test_counts_a_layer_that_are_all_the_same():
  config = read(feed_forward_length=[40] * 6, attention__head_count_kv=[2] * 6)
  assert (config.mlp_width, config.kv_heads) == (40, 2)
  assert read().kv_heads == 4  # as many as queries


@pytest.mark.parametrize(
  ("arch", "keys", "message"),
  [
    ("llama", {"attention__clamp_kqv": 8.0}, "attention.clamp_kqv' is 8.0, which changes"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale' is 0.0625, which changes the result"),
    ("qwen2", {"residual_scale": 0.22}, "qwen2.residual_scale' is 0.2"),
    ("gpt2", {"attention__max_alibi_bias": 8.0}, "max_alibi_bias' is 8.0"),
    ("llama", {"use_parallel_residual": True}, "use_parallel_residual' is True"),
    ("qwen3", {"rope__dimension_sections": [2, 1, 0, 0]}, "dimension_sections' is .2, 1, 0, 0."),
    ("llama", {"tensor_data_layout": "odd"}, "tensor_data_layout' is 'odd'"),
    ("llama", {"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor' is 0.5"),
    ("llama", {"rope__scaling__attn_factor": 2.0}, "attn_factor' 2.0 is known with yarn alone"),
    ("llama", {"rope__scaling__factor": 0.5}, "factor 0.5 is below 1"),
    ("llama", {"rope__scaling__type": "longrope"}, "longrope needs tensors 'rope_factors_short"),
    ("llama", {"rope__scaling__type": "su"}, "scaling 'su' is not one of"),
    ("gpt2", {"factors": {"rope_freqs.weight": np.ones(3)}}, "learned positions as well"),
    ("phi3", {"factors": {"rope_factors_long.weight": np.ones(3)}}, "longrope needs tensors"),
    ("llama", {"rope__freq_base": "10000"}, "freq_base' is '10000', not a finite number"),
    ("llama", {"rope__freq_base": math.nan}, "freq_base' is nan, not a finite number"),
    ("llama", {"attention__sliding_window": 8}, "a sliding window in GGUF architecture llama"),
    ("llama", {"attention__value_length": 8}, "value_length' is 8 and not 6"),
    ("gemma3", {"attention__key_length_swa": 8}, "key_length_swa' is 8 and not 6"),
    ("gemma2", {"attention__sliding_window_pattern": [True]}, "has 1 flags for 6 layers"),
    (
      "gemma2", {"rope__freq_base_swa": 500.0, "rope__scaling__factor": 2.0},
      "scaled positions and 'rope.freq_base_swa'",
    ),
    ("llama", {"attention__head_count": [4, 4, 2, 2, 4, 4]}, "not one whole number"),
    ("llama", {"expert_count": 8}, "mixture of experts"),
  ],
)
def test_a_key_that_changes_the_result_is_refused(arch, keys, message):
  with pytest.raises(UserError, match=message):
    read(arch, **keys)


@pytest.mark.parametrize(
  ("arch", "key"),
  [
    ("llama", "attention.layer_norm_rms_epsilon"),
    ("bert", "attention.layer_norm_epsilon"),
    ("llama", "context_length"),
    ("qwen3", "block_count"),
  ],
)
def test_a_key_without_a_default_must_be_there(arch, key):
  with pytest.raises(UserError, match=f"'{arch}.{key}' is missing"):
    read(arch, missing=[key])


def test_what_nothing_reads_is_named_unless_it_is_harmless(capsys):
  read(
    attention__clamp_kqv=0.0, logit_scale=1.0, expert_count=0, expert_gating_func=2, vocab_size=61,
    tensor_data_layout="Meta AI original pth", rope__scaling__finetuned=False,
  )
  assert capsys.readouterr().err == ""
  read("qwen3", some__thing=1, rope__new_key="x")
  named = "nothing reads these keys of the GGUF file: qwen3.some.thing, qwen3.rope.new_key"
  assert capsys.readouterr().err == f"llmjax: note: {named}\n"
  with pytest.raises(UserError, match=r"holds no model: its general.type is 'adapter'"):
    config_of({"general.architecture": "llama", "general.type": "adapter"}, {}, {})
