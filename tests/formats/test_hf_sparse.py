"""Keys that a `config.json` has not: they mean what the class of transformers says."""

import json
import random

import pytest

from llmjax.core.errors import UserError
from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.canonical import canonical
from tests import golden

# model_type → what its config class gives without arguments (tests/oracle/test_sparse.py).
DEFAULTS = json.loads((golden.FOLDER / "defaults.json").read_text())


def outcome(theirs: dict):
  """What we read of a config, or why we do not."""
  try:
    return canonical(hf.read_config(hf.family_of(theirs), theirs, quiet=True))
  except UserError as error:
    return str(error)


def thinned(theirs: dict, rng: random.Random) -> dict:
  """Leaves out some of the keys, and some of those of its sections."""
  share = rng.random()
  kept = {key: value for key, value in theirs.items() if rng.random() < share}
  for name in kept.keys() & {"text_config", "vision_config"}:
    kept[name] = thinned(kept[name], rng)
  return kept | ({"model_type": theirs["model_type"]} if "model_type" in theirs else {})


def test_every_family_is_there():
  assert DEFAULTS.keys() == hf.FAMILIES.keys()


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_a_missing_key_is_the_familys_default(name):
  want = outcome(DEFAULTS[name])
  # Its class does not say how many experts a token has.
  assert isinstance(want, str) == (name == "deepseek_v2"), want
  rng = random.Random(name)
  for theirs in ({"model_type": name}, *(thinned(DEFAULTS[name], rng) for _ in range(8))):
    if "vision_config" in theirs:  # one that says less is CLIP's, whose sizes are not LLaVA's
      theirs["vision_config"] = DEFAULTS[name]["vision_config"]
    assert outcome(theirs) == want, theirs


@pytest.mark.parametrize(
  ("theirs", "told"),
  [
    ({"model_type": "llama", "rms_norm_eps": None}, "has no 'rms_norm_eps'"),
    ({"model_type": "gpt2", "n_embd": None}, "has no 'n_embd'"),
    ({"model_type": "qwen3", "head_dim": None}, "has no 'head_dim'"),
    (
      {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 16},
      "layer_types=.* beside sliding_window=4096 is not supported",
    ),
    ({"model_type": "qwen2", "num_hidden_layers": "2"}, "'model.layers' must be int, not '2'"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": "9"}, "query_pre_attn_scalar='9' is not"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": "6"}, "another kind"),
    ({"model_type": "llava", "text_config": ["llama"]}, "another kind"),
    ({"model_type": "bert", "pruned_heads": {"0": [1]}}, "without some of their heads"),
    (
      {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
      "known: plain ones in windows",
    ),
  ],
)
def test_what_would_change_the_result_is_refused(theirs, told):
  with pytest.raises(UserError, match=told):
    hf.read_config(hf.family_of(theirs), theirs)


@pytest.mark.parametrize(
  ("theirs", "tied"),
  [
    ({"model_type": "llava"}, False),
    ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
    ({"model_type": "llava", "tie_word_embeddings": True, "text_config": {}}, True),
    ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, True),
    ({"model_type": "gemma3", "tie_word_embeddings": False, "text_config": {}}, False),
  ],
)
def test_a_whole_model_says_whether_its_text_model_is_tied(theirs, tied):
  assert outcome(theirs).tie_embeddings == tied


def test_names_that_transformers_takes_as_well_are_read():
  theirs = {"model_type": "gpt2", "hidden_size": 96, "num_hidden_layers": 3}
  made = outcome(theirs | {"num_attention_heads": 6, "max_position_embeddings": 40})
  assert (made.width, made.layers, made.heads, made.max_seq_len) == (96, 3, 6, 40)
  assert outcome({"model_type": "t5", "num_hidden_layers": 4}).encoder_layers == 4
