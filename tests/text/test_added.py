"""Tokens that a folder adds beside its model: text or special, their flags; files of all makers."""

import base64
import json

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from llmjax.core.errors import UserError
from llmjax.text.folder import load_tokenizer, save
from llmjax.text.tokenizer import framed, from_state, to_state
from tests.text.test_kinds import EVERY, TRAINED

SIZE = TRAINED["bpe"].vocab_size
# Ids go on where the vocabulary ends. `[p]` is text; the others are what their names say.
FLAGS = {
  "[p]": {},
  "[left]": {"lstrip": True, "special": True},
  "[right]": {"rstrip": True, "normalized": False},
  "[word]": {"single_word": True},
  "[raw]": {"normalized": False},
  "[end]": {"special": True},
}
# text → its tokens, named ones by name and the rest by what they decode to, as transformers has it.
CASES = {
  "a[p]b": ["a", "[p]", "b"],
  "a [left] b": ["a", "[left]", " b"],
  "a [right] b": ["a ", "[right]", "b"],
  "a[word]b [word] c": ["a[word]b ", "[word]", " c"],
  "x[raw][p]": ["x", "[raw]", "[p]"],
}


def config(first: int = SIZE) -> dict:
  entries = enumerate(FLAGS.items(), first)
  return {"added_tokens_decoder": {i: {"content": token, **flags} for i, (token, flags) in entries}}


def put(folder, **files):
  for name, value in files.items():
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / f"{name}.json").write_text(text)


def pieces(made, ids: list[int]) -> list[str]:
  """Ids as names of added tokens, what stands between them as text."""
  names = {i: token for token in FLAGS if (i := made.find(token)) is not None}
  found, run = [], []
  for i in ids:
    if i in names:
      found += [*([made.decode(run)] if run else []), names[i]]
    run = [] if i in names else [*run, i]
  return [*found, made.decode(run)] if run else found


def check(made):
  assert made.special_tokens.keys() >= {"[left]", "[end]"}
  assert not made.special_tokens.keys() & {"[p]", "[right]", "[word]", "[raw]"}
  for text, want in CASES.items():
    ids = made.encode(text, allow_special=True)
    assert pieces(made, ids) == want
    kept = "".join(part for part in want if part != "[left]")
    assert made.decode(ids) == kept  # what is special vanishes, what is text comes back
  assert made.find("[end]") not in made.encode("a[end]")  # special, so text unless it is asked for
  assert made.find("[p]") in made.encode("a[p]")


def test_entries_beside_a_tokenizer_json_are_added_with_their_flags(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
  put(tmp_path, tokenizer_config=config())
  made = load_tokenizer(tmp_path)
  check(made)
  check(from_state(to_state(made)))
  save(made, tmp_path / "again")
  check(load_tokenizer(tmp_path / "again"))


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "tiktoken"])
def test_beside_a_model_of_another_make_they_are_the_same(kind, tmp_path):
  plain = EVERY[kind]
  save(plain, tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  theirs = json.loads((tmp_path / "tokenizer_config.json").read_text())
  own = {**theirs["added_tokens_decoder"], **config(plain.vocab_size)["added_tokens_decoder"]}
  put(tmp_path, tokenizer_config={**theirs, "added_tokens_decoder": own})
  made = load_tokenizer(tmp_path)
  check(made)
  for text in ("the quick fox", "  é 1 2\n"):
    assert made.encode(text) == plain.encode(text)
  assert (made.bos_id, made.eos_id) == (plain.bos_id, plain.eos_id)
  assert framed(made, "decoder", [9]) == [*([] if plain.bos_id is None else [plain.bos_id]), 9]


def test_a_tokenizer_json_knows_its_own_tokens_best(tmp_path):
  save(TRAINED["bpe"], tmp_path)
  said = {"added_tokens_decoder": {"1": {"content": "<|eos|>", "special": False, "rstrip": True}}}
  put(tmp_path, tokenizer_config=said)
  assert load_tokenizer(tmp_path).to_bytes() == TRAINED["bpe"].to_bytes()


def test_of_a_bare_model_the_folder_knows_more(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(TRAINED["sentencepiece"].to_bytes())
  said = {"2": {"content": "</s>", "special": False}, "0": {"content": "<unk>", "special": True}}
  put(tmp_path, tokenizer_config={"added_tokens_decoder": said, "eos_token": "<s>"})
  made = load_tokenizer(tmp_path)
  assert made.encode("a</s>")[-1] == 2 and made.decode(made.encode("a</s>")) == "a</s>"
  del said["2"]
  put(tmp_path, tokenizer_config={"added_tokens_decoder": said})
  assert load_tokenizer(tmp_path).kind == "sentencepiece"  # nothing new was said


def test_added_tokens_json_is_text_unless_a_token_has_a_name(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
  put(tmp_path, added_tokens={"<call>": SIZE, "<end>": SIZE + 1, "<more>": SIZE + 2})
  end = {"content": "<end>", "rstrip": True}
  put(tmp_path, special_tokens_map={"eos_token": end, "additional_special_tokens": ["<more>"]})
  made = load_tokenizer(tmp_path)
  ids = made.encode("<call>x<end> <more>", allow_special=True)
  assert (ids[0], ids[-2:], made.eos_id) == (SIZE, [SIZE + 1, SIZE + 2], SIZE + 1)
  assert made.decode(ids) == "<call>x"


def test_a_token_of_the_vocabulary_that_has_a_name_is_special(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
  put(tmp_path, tokenizer_config={"mask_token": "the"})
  made = load_tokenizer(tmp_path)
  assert made.special_tokens["the"] == TRAINED["bpe"].find("the")


def test_an_id_that_a_token_cannot_have_is_a_user_error(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(TRAINED["bpe"].to_bytes())
  put(tmp_path, tokenizer_config=config(SIZE + 3))
  with pytest.raises(UserError, match=rf"'\[p\]' is said to be id {SIZE + 3}, where only {SIZE}"):
    load_tokenizer(tmp_path)


TEKKEN = {
  "config": {
    "pattern": r"\w+|\W",
    "num_vocab_tokens": 258,
    "default_vocab_size": 265,
    "default_num_special_tokens": 8,
    "version": "v7",
  },
  "vocab": [
    {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
    for i, token in enumerate([*(bytes([byte]) for byte in range(256)), b"he", b"unused"])
  ],
  "special_tokens": [
    {"rank": i, "token_str": name, "is_control": True}
    for i, name in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
  ],
}


def test_tekken_s_ranks_stand_behind_its_special_tokens(tmp_path):
  put(tmp_path, tekken=TEKKEN)
  made = load_tokenizer(tmp_path)
  assert made.encode("he h") == [256 + 8, 32 + 8, 104 + 8]
  assert made.encode("<s>[INST]h", allow_special=True) == [1, 3, 112]
  assert (made.vocab_size, made.special_tokens["<SPECIAL_7>"]) == (265, 7)  # the last is too many
  assert (made.bos_id, made.eos_id, made.pad_id) == (1, 2, None)
  assert framed(made, "decoder", [112]) == [1, 112]
  save(made, tmp_path / "again")
  assert to_state(load_tokenizer(tmp_path / "again")) == to_state(made)
  put(tmp_path, tekken={name: part for name, part in TEKKEN.items() if name != "special_tokens"})
  with pytest.raises(UserError, match=r"tekken.json.* lists no special_tokens"):
    load_tokenizer(tmp_path)


def test_xlm_r_s_ids_are_those_of_fairseq(tmp_path):
  plain = TRAINED["unigram"]
  (tmp_path / "sentencepiece.bpe.model").write_bytes(plain.to_bytes())
  put(tmp_path, tokenizer_config={"tokenizer_class": "XLMRobertaTokenizer"})
  made = load_tokenizer(tmp_path)
  # <unk>, <s>, </s> are 0 to 2 in the file; <s>, <pad>, </s>, <unk> are 0 to 3 in fairseq's.
  assert made.encode("the quick fox") == [i + 1 for i in plain.encode("the quick fox")]
  assert (made.bos_id, made.pad_id, made.eos_id, made.unk_id) == (0, 1, 2, 3)
  assert made.special_tokens["<mask>"] == made.vocab_size - 1 == plain.vocab_size + 1
  assert framed(made, "encoder", [9]) == [0, 9, 2]
  assert made.decode(made.encode("the quick fox")) == "the quick fox"
  for maker in ("CamembertTokenizer", "NllbTokenizerFast"):
    put(tmp_path, tokenizer_config={"tokenizer_class": maker})
    with pytest.raises(UserError, match="is not known, only how XLMRoberta do; give"):
      load_tokenizer(tmp_path)


def test_t5_s_file_ends_texts_with_eos(tmp_path):
  spec = proto.ModelProto.FromString(TRAINED["unigram"].to_bytes())
  spec.trainer_spec.bos_id = -1
  spec.pieces[1].piece = "<pad>"
  (tmp_path / "spiece.model").write_bytes(spec.SerializeToString())
  made = load_tokenizer(tmp_path)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
  assert framed(made, "encoder_decoder", made.encode("fox")) == [*theirs.encode("fox"), 2]
  put(tmp_path, tokenizer_config={"tokenizer_class": "PegasusTokenizer"})
  with pytest.raises(UserError, match="how the tokenizer_class 'Pegasus' numbers the pieces"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["qwen.tiktoken", "spiece.model", "tokenizer.model"])
def test_files_are_found_by_their_names(name, tmp_path):
  kind = "tiktoken" if name.endswith("tiktoken") else "unigram"
  save(EVERY[kind], tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  source = tmp_path / ("ranks.tiktoken" if kind == "tiktoken" else "tokenizer.model")
  source.rename(tmp_path / name)
  assert load_tokenizer(tmp_path).encode("the fox") == EVERY[kind].encode("the fox")
