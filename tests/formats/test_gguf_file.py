"""A GGUF file's model is the one whose weights were written, whatever they were packed into."""

import dataclasses
import math

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import llmjax
from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.formats.gguf.rope import with_divisors
from llmjax.nn.position import PositionConfig, rope_frequencies
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from tests.gguf_files import CONFIG, IDS, draw, llama_metadata, llama_tensors, write, write_folder

pytestmark = pytest.mark.usefixtures("quick_compile")

# One layer of matrices whose rows are whole blocks of 256 numbers.
WIDE = CONFIG | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}


def save_folder(folder, tensors, config):
  write_folder(folder, tensors, config)
  return llmjax.load(folder)


def save_gguf(path, tensors, config, types=None, **metadata):
  named = {name: types[name] for name in types or {}}
  write(path, "llama", llama_metadata(config) | metadata, llama_tensors(tensors, config), named)
  return path


def same_logits(one, other):
  # fp32 on both sides, logits of order 10: the two orders of rotary channels round apart.
  np.testing.assert_allclose(one.logits(IDS), other.logits(IDS), atol=2e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("llama") / "hf"
  write_folder(path, draw())
  return llmjax.load(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  return save_gguf(path, draw(), CONFIG)


def test_fp32_weights_give_the_logits_of_the_folder(folder, file):
  model = llmjax.load(file)
  assert model.config.position.layout == "interleaved" and model.tokenizer is None
  assert model.config.norm.eps == 1e-5
  same_logits(model, folder)
  ours, theirs = tree.flatten(model.parameters), tree.flatten(folder.parameters)
  for path, want in theirs.items():
    if not path.endswith(("query_dnh", "key_dkh")):
      np.testing.assert_array_equal(ours[path], want, err_msg=path)


def test_a_tied_model_has_no_output_tensor(tmp_path, folder):
  tensors = {name: array for name, array in draw().items() if name != "lm_head.weight"}
  model = llmjax.load(save_gguf(tmp_path / "tied", tensors, CONFIG))  # known by its content
  tied = save_folder(tmp_path / "hf", tensors, CONFIG | {"tie_word_embeddings": True})
  assert model.config.tie_embeddings
  same_logits(model, tied)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_half_precision_weights_are_read_as_they_are(kind, tmp_path):
  def rounded(array):
    if kind == Type.F16:
      return array.astype(np.float16).astype(np.float32)
    bits = array.view(np.uint32)
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)

  def packed(array):
    if kind == Type.F16:
      return array.astype(np.float16)
    return (array.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

  weights = {
    name: rounded(array) if array.ndim == 2 else array for name, array in draw().items()
  }
  written = {
    name: packed(array) if array.ndim == 2 else array for name, array in weights.items()
  }
  named = llama_tensors(written, CONFIG)
  types = {name: kind for name, array in named.items() if array.dtype == np.uint8}
  write(tmp_path / "a.gguf", "llama", llama_metadata(CONFIG), named, types)
  want = save_folder(tmp_path / "hf", weights, CONFIG)
  same_logits(llmjax.load(tmp_path / "a.gguf"), want)


# Block formats, written from ggml-common.h's structs: a block is so many numbers in so many bytes.


def _halves(block, start):
  return block[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(block, start):
  """32 numbers: the low halves of 16 bytes, then the high halves."""
  packed = block[:, start : start + 16]
  return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _fifth_bits(block, start):
  word = block[:, start : start + 4].copy().view(np.uint32)
  return ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float32) * 16


def q8_0(block):
  return block[:, 2:].view(np.int8) * _halves(block, 0)


def q4_0(block):
  return (_nibbles(block, 2) - 8) * _halves(block, 0)


def q4_1(block):
  return _nibbles(block, 4) * _halves(block, 0) + _halves(block, 2)


def q5_0(block):
  return (_nibbles(block, 6) + _fifth_bits(block, 2) - 16) * _halves(block, 0)


def q5_1(block):
  return (_nibbles(block, 8) + _fifth_bits(block, 4)) * _halves(block, 0) + _halves(block, 2)


# type → (numbers a block, bytes a block, places of its fp16 scales, what it means)
BLOCKS = {
  Type.Q8_0: (32, 34, [0], q8_0),
  Type.Q4_0: (32, 18, [0], q4_0),
  Type.Q4_1: (32, 20, [0, 2], q4_1),
  Type.Q5_0: (32, 22, [0], q5_0),
  Type.Q5_1: (32, 24, [0, 2], q5_1),
  Type.Q2_K: (256, 84, [80, 82], None),
  Type.Q3_K: (256, 110, [108], None),
  Type.Q4_K: (256, 144, [0, 2], None),
  Type.Q5_K: (256, 176, [0, 2], None),
  Type.Q6_K: (256, 210, [208], None),
}


def draw_blocks(kind, rows, columns, rng):
  """Random bytes with sensible scales: (blocks [rows, bytes], the numbers they mean)."""
  numbers, size, scales, meaning = BLOCKS[kind]
  block = rng.integers(0, 256, (rows * columns // numbers, size), np.uint8)
  for place in scales:
    drawn = rng.normal(size=(len(block), 1)) * (2e-3 if numbers == 32 else 2e-4)
    block[:, place : place + 2] = drawn.astype(np.float16).view(np.uint8)
  flat = block.reshape(rows, -1)
  if meaning is None:  # K-quants are gguf's own word; what is tested is where they end up
    return flat, gguf.quants.dequantize(flat, kind)
  return flat, meaning(block).reshape(rows, columns).astype(np.float32)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_quantized_weights_are_what_their_blocks_mean(kind, tmp_path):
  rng = np.random.default_rng(kind)
  d, kv = WIDE["hidden_size"], WIDE["num_key_value_heads"] * WIDE["head_dim"]
  layer = "model.layers.0."
  shapes = {layer + f"self_attn.{name}_proj.weight": (rows, d) for name, rows in
            (("q", d), ("k", kv), ("v", kv), ("o", d))}
  shapes |= {layer + f"mlp.{name}_proj.weight": (d, d) for name in ("gate", "up", "down")}
  shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (WIDE["vocab_size"], d)
  drawn = {name: draw_blocks(kind, *shape, rng) for name, shape in shapes.items()}
  ones = {layer + f"{name}_layernorm.weight": np.ones(d, np.float32)
          for name in ("input", "post_attention")}
  ones["model.norm.weight"] = np.ones(d, np.float32)
  blocks = llama_tensors({name: pair[0] for name, pair in drawn.items()} | ones, WIDE)
  types = {name: kind for name, array in blocks.items() if array.dtype == np.uint8}
  write(tmp_path / "a.gguf", "llama", llama_metadata(WIDE), blocks, types)
  found = tree.flatten(llmjax.load(tmp_path / "a.gguf").parameters)
  want = {name: pair[1] for name, pair in drawn.items()} | ones
  want = tree.flatten(save_folder(tmp_path / "hf", want, WIDE).parameters)
  for path, array in want.items():
    if path.endswith(("query_dnh", "key_dkh")):  # there pairs are halves, here side by side
      array = np.stack([array[..., :16], array[..., 16:]], axis=-1).reshape(array.shape)
    np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_llama3_scaling_is_found_in_its_divisors():
  """The divisors as Llama 3's release computes them, by wavelength."""
  for h, theta, factor, low, high, original in (
    (128, 5e5, 8.0, 1.0, 4.0, 8192), (64, 5e5, 32.0, 1.0, 4.0, 8192), (64, 1e4, 4.0, 2.0, 6.0, 512)
  ):
    divisors = []
    for i in range(0, h, 2):
      wavelength = 2 * math.pi * theta ** (i / h)
      if wavelength < original / high:
        divisors.append(1.0)
      elif wavelength > original / low:
        divisors.append(factor)
      else:
        smooth = (original / wavelength - low) / (high - low)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    plain = PositionConfig(theta=theta)
    found = with_divisors(plain, h, np.array(divisors, np.float32).astype(float))
    assert (found.scaling, found.factor, found.original_context) == (
      "llama3", factor, round(original / low)
    )
    assert found.high_freq_factor == pytest.approx(high / low)
    want = rope_frequencies(plain, h) / np.array(divisors)
    np.testing.assert_allclose(rope_frequencies(found, h), want, rtol=1e-5)  # fp32 divisors
  assert with_divisors(plain, 64, np.ones(32)) == plain
  with pytest.raises(UserError, match=r"rope_freqs are no scaling"):
    with_divisors(plain, 64, np.linspace(1, 9, 32))


def test_a_damaged_file_is_one_clear_sentence(file, tmp_path):
  whole = file.read_bytes()
  for cut in (0, 3, 4, 20, 100, 600, len(whole) // 2, len(whole) - 1):
    (tmp_path / "cut.gguf").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"cut.gguf' is not a whole GGUF file, .* \(\w+: .*\)$"):
      llmjax.load(tmp_path / "cut.gguf")
  (tmp_path / "text.gguf").write_text("this is a story\n" * 9)
  with pytest.raises(UserError, match=r"text.gguf' is not a whole GGUF file, .*magic"):
    llmjax.load(tmp_path / "text.gguf")
  at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
  (tmp_path / "odd.gguf").write_bytes(whole[:at] + bytes([99]) + whole[at + 1 :])
  with pytest.raises(UserError, match=r"99\)? is not a valid GGMLQuantizationType"):
    llmjax.load(tmp_path / "odd.gguf")


def test_a_model_split_into_files_loads_from_the_first(file, tmp_path):
  tensors = llama_tensors(draw(), CONFIG)
  path = tmp_path / "model.gguf"
  write(path, "llama", llama_metadata(CONFIG), tensors, split=8, first_small=True)
  names = [f"model-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]  # the first holds no tensor
  assert sorted(each.name for each in tmp_path.iterdir()) == names
  one, two, three, four = (tmp_path / name for name in names)
  found, want = (tree.flatten(llmjax.load(each).parameters) for each in (one, file))
  assert found.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  with pytest.raises(UserError, match=r"of 4 files; load the first, '.*-00001-of-00004.gguf'$"):
    llmjax.load(two)
  content, last = three.read_bytes(), four.read_bytes()
  three.write_bytes(last)
  with pytest.raises(UserError, match=r"00003-of-00004.gguf' says that it is not file 3 of 4$"):
    llmjax.load(one)
  three.write_bytes(content[:-200])
  with pytest.raises(UserError, match=r"00003-of-00004.gguf' is not a whole GGUF file"):
    llmjax.load(one)
  three.unlink()
  with pytest.raises(UserError, match=r"00003-of-00004.gguf': No such file"):
    llmjax.load(one)
  with pytest.raises(UserError, match=r"is one of 4 files, but not called"):
    llmjax.load(one.rename(tmp_path / "other.gguf"))


def test_a_refused_tokenizer_leaves_the_weights(folder, tmp_path, capsys):
  def load(**tokenizer):
    keys = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    return llmjax.load(save_gguf(tmp_path / "a.gguf", draw(), CONFIG, **keys))

  pieces = {"tokens": ["<unk>", "<s>", "</s>", *map(str, range(59))], "scores": [0.0] * 62}
  for tokenizer, why in (
    ({"model": "rwkv"}, "GGUF tokenizer model 'rwkv' is not known; known: bert, gpt2, llama, t5"),
    ({"model": "none"}, "the GGUF file holds no vocabulary"),
    ({"model": "llama"} | pieces, "it has 62 tokens, the embedding 61 rows"),
  ):
    model = load(**tokenizer)
    assert model.tokenizer is None
    assert capsys.readouterr().err == f"llmjax: note: the model has no tokenizer: {why}\n"
  same_logits(model, folder)


def test_a_type_that_is_not_dequantized_and_a_tensor_that_is_not_read_are_named(tmp_path):
  tensors = llama_tensors(draw(), CONFIG)

  def load(**more):
    write(tmp_path / "a.gguf", "llama", llama_metadata(CONFIG), tensors | more)
    return llmjax.load(tmp_path / "a.gguf")

  bytes_of = tensors["blk.0.ffn_up.weight"].astype(np.int8)
  with pytest.raises(UserError, match=r"tensor 'blk.0.ffn_up.weight' is of type I8, which is not"):
    load(**{"blk.0.ffn_up.weight": bytes_of})
  with pytest.raises(UserError, match=r"1 tensors have no place in the model: blk.1.ffn_gate.bias"):
    load(**{"blk.1.ffn_gate.bias": np.ones(40, np.float32)})
  divided = load(**{"rope_freqs.weight": np.ones(4, np.float32)})  # a scaling that does nothing
  assert divided.config.position.scaling == "none"
  with pytest.raises(UserError, match=r"rope_freqs are no scaling"):
    load(**{"rope_freqs.weight": np.linspace(1, 9, 4).astype(np.float32)})


def test_any_byte_of_the_metadata_may_be_wrong(file, tmp_path):
  whole = file.read_bytes()
  end = whole.index(b"token_embd.weight")
  rng = np.random.default_rng(0)
  loaded = 0
  for place in rng.integers(4, end, 20):
    path = tmp_path / "odd.gguf"
    path.write_bytes(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])
    try:
      llmjax.load(path)
      loaded += 1
    except UserError as error:
      assert "\n" not in str(error)
  assert loaded < 20


def test_what_is_not_known_is_named(tmp_path):
  tensors, path = draw(), tmp_path / "a.gguf"

  def load(tensors=tensors, config=CONFIG, **metadata):
    return llmjax.load(save_gguf(path, tensors, config, **metadata))

  with pytest.raises(UserError, match="mixture of experts"):
    load(**{"llama.expert_count": 8})
  with pytest.raises(UserError, match=r"'llama.feed_forward_length' is \[40, 48\], not one"):
    load(**{"llama.feed_forward_length": [40, 48]})
  with pytest.raises(UserError, match=r"tensor 'blk.2.attn_q.weight' .* is missing"):
    load(config=CONFIG | {"num_hidden_layers": 3})
  with pytest.raises(UserError, match=r"tensors have no place in the model: blk\.1"):
    load(config=CONFIG | {"num_hidden_layers": 1})
  with pytest.raises(UserError, match="it is not a whole model"):
    load({"model.norm.weight": np.ones(24, np.float32)})
  write(path, "mamba9", {}, {"a": np.ones(3, np.float32)})
  with pytest.raises(UserError, match="architecture 'mamba9' is not one of bert, gemma, gemma2"):
    llmjax.load(path)


def test_attention_that_is_not_causal_is_read_and_writes_no_text(tmp_path):
  path = save_gguf(tmp_path / "a.gguf", draw(), CONFIG, **{"llama.attention.causal": False})
  model = llmjax.load(path)
  changed = np.where(np.arange(17) == 16, 5, IDS)  # the last token
  first, other = (np.asarray(model.logits(ids))[:, 0] for ids in (IDS, changed))
  assert np.abs(first - other).max() > 0.01  # seen by the first
  with pytest.raises(UserError, match="attention is bidirectional, so it writes no text"):
    generate_ids(model, [[1, 2]], Sampling())


def test_a_position_without_scaling_stays(file):
  position = llmjax.load(file).config.position
  assert position == dataclasses.replace(PositionConfig(), layout="interleaved")
