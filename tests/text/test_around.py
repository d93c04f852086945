"""What stands around a text is what the tokenizer's own files say, in prompts and vectors alike."""

import json

import pytest

from llmjax.text.base import NONE, Settings, bos_eos
from llmjax.text.folder import load_tokenizer, save
from llmjax.text.tokenizer import (
  TokenizerConfig,
  framed,
  from_state,
  to_state,
  train_tokenizer,
)
from tests.text.test_kinds import EVERY, TRAINED, load_shared

BOS, EOS, PAD = 0, 1, 2  # of the byte-level BPE


def special(*names) -> list[dict]:
  return [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]


def template(before: list[dict], after: list[dict]) -> dict:
  ids = {"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD}
  single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
  listed = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
  return {
    "type": "TemplateProcessing",
    "single": single,
    "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": listed,
  }


LETTERS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
PAIR = {"sep": ["<|eos|>", EOS], "cls": ["<|bos|>", BOS]}
FLAGS = {"add_bos_token": True, "add_eos_token": True}
# post_processor, tokenizer_config.json → what transformers 5.23 puts around a text, seen in
# tests/oracle; where the file names nothing it ignores the two flags, which we follow.
PROCESSORS = {
  "none": (None, {}, [[], []]),
  "letters": (LETTERS, {}, [[], []]),
  "template": (template(special("<|bos|>"), []), {}, [[BOS], []]),
  "end": (template([], special("<|eos|>")), {}, [[], [EOS]]),
  "several": (
    template(special("<|pad|>", "<|bos|>"), special("<|eos|>", "<|pad|>")),
    {},
    [[PAD, BOS], [EOS, PAD]],
  ),
  "bert": ({"type": "BertProcessing", **PAIR}, {}, [[BOS], [EOS]]),
  "roberta": (
    {"type": "RobertaProcessing", **PAIR, "trim_offsets": True, "add_prefix_space": False},
    {},
    [[BOS], [EOS]],
  ),
  "sequence": (
    {"type": "Sequence", "processors": [LETTERS, template(special("<|bos|>"), [])]},
    {},
    [[BOS], []],
  ),
  "the file wins": (
    template(special("<|bos|>"), []),
    {"add_bos_token": False, "add_eos_token": True},
    [[BOS], []],
  ),
}
OURS = {"flags alone": (None, FLAGS, [[BOS], [EOS]]), "flags": (LETTERS, FLAGS, [[BOS], [EOS]])}


def write(folder, processor, config):
  """A Hugging Face folder of our byte-level BPE with another post-processor."""
  made = {**json.loads(TRAINED["bpe"].to_bytes()), "post_processor": processor}
  (folder / "tokenizer.json").write_text(json.dumps(made))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return load_tokenizer(folder)


@pytest.mark.parametrize("case", {**PROCESSORS, **OURS})
def test_a_post_processor_decides_and_then_the_flags(case, tmp_path):
  processor, config, (before, after) = {**PROCESSORS, **OURS}[case]
  made = write(tmp_path, processor, config)
  ids = TRAINED["bpe"].encode("the fox")
  for kind in ("decoder", "encoder", "encoder_decoder"):
    assert framed(made, kind, ids) == [*before, *ids, *after]
  assert from_state(to_state(made)).settings.affixes == [before, after]
  save(made, tmp_path / "again")
  assert load_tokenizer(tmp_path / "again").settings.affixes == [before, after]


def test_smollm2_s_prompts_have_no_bos(shared_data):
  made = load_shared(shared_data / "smollm2-135m")
  ids = made.encode("The capital of France is")
  assert framed(made, "decoder", ids) == [504, 3575, 282, 4649, 314]  # as transformers gives them
  assert framed(made, "decoder", []) == [1]  # something has to be there


# What the field puts around "a": the makers' own code, by the file alone.
FILES = {
  "neox/20B_tokenizer.json": ([], []),
  "mistral/tokenizer.model.v1": ([1], []),
  "gpt2": ([], []),
  "cl100k": ([], []),
  "bert": ([101], [102]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_alone_has_what_its_kind_has(name, shared_data):
  made = load_shared(shared_data / "tokenizers" / name)
  before, after = FILES[name]
  assert framed(made, "decoder", made.encode("a")) == [*before, *made.encode("a"), *after]


@pytest.mark.parametrize(
  ("flags", "want"),
  [({}, [[1], []]), ({"add_bos_token": False}, [[], []]), ({"add_eos_token": True}, [[1], [2]])],
)
def test_beside_a_sentencepiece_model_the_flags_decide(flags, want, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(TRAINED["sentencepiece"].to_bytes())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags))
  assert load_tokenizer(tmp_path).settings.affixes == want


def test_a_vocabulary_of_roberta_s_is_framed_as_its_own_code_does(tmp_path):
  letters = json.loads(TRAINED["bpe"].to_bytes())["model"]["vocab"]
  vocabulary = {**letters, "<s>": len(letters), "</s>": len(letters) + 1}
  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  config = {"tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert load_tokenizer(tmp_path).settings.affixes == [[len(letters)], [len(letters) + 1]]


@pytest.mark.parametrize(
  ("kind", "want"),
  [("decoder", [[1], []]), ("encoder", [[1], [2]]), ("encoder_decoder", [[], [2]])],
)
def test_trained_here_a_text_stands_as_in_training(kind, want, tmp_path):
  made = TRAINED["sentencepiece"]
  assert framed(made, kind, [9]) == [*want[0], 9, *want[1]]
  save(made, tmp_path, want)
  assert load_tokenizer(tmp_path).settings.affixes == want
  # A run that reads the file frames its documents itself, and its prompts likewise.
  config = TokenizerConfig(kind="sentencepiece", vocab_size=0, path=str(tmp_path))
  assert framed(train_tokenizer(config, []), kind, [9]) == [*want[0], 9, *want[1]]


def test_checkpoints_of_older_versions_keep_their_prompts():
  state = to_state(EVERY["bytes"])
  old = from_state({**state, "settings": {"add_bos": False}})
  assert framed(old, "decoder", [65]) == [65]
  assert framed(from_state({**state, "settings": {}}), "decoder", [65]) == [256, 65]
  assert bos_eos(NONE, 3) == [[], [3]] and Settings().affixes is None
