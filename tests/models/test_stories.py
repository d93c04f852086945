"""Real weights: stories260K continues the published prompt to the character."""

import json
import re
import struct

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as spm

from llmjax.formats.hf.layout import from_tensors
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.serve.generate import generate, stream
from llmjax.serve.sample import Sampling
from llmjax.text.sentencepiece import SentencePiece

# llama2.c's own order of tensors; layers stand together, so names have no layer number.
TABLE = {
  "embed": ("vd", "embed/token_vd"),
  "rms_att.{l}": ("d", "decoder/blocks/attention_norm/scale_d"),
  "wq.{l}": ("(nh)d", "decoder/blocks/attention/query_dnh"),
  "wk.{l}": ("(kh)d", "decoder/blocks/attention/key_dkh"),
  "wv.{l}": ("(kh)d", "decoder/blocks/attention/value_dkh"),
  "wo.{l}": ("d(nh)", "decoder/blocks/attention/out_nhd"),
  "rms_ffn.{l}": ("d", "decoder/blocks/mlp_norm/scale_d"),
  "w1.{l}": ("fd", "decoder/blocks/mlp/gate_df"),
  "w2.{l}": ("df", "decoder/blocks/mlp/down_fd"),
  "w3.{l}": ("fd", "decoder/blocks/mlp/up_df"),
  "rms_final": ("d", "decoder/norm/scale_d"),
}


def read_bin(path) -> tuple[ModelConfig, dict]:
  """Reads a llama2.c checkpoint (version 0: seven int32, then fp32 tensors)."""
  data = path.read_bytes()
  d, f, l, n, k, v, context = struct.unpack("<7i", data[:28])
  config = ModelConfig(
    layers=l,
    width=d,
    heads=n,
    kv_heads=k,
    mlp_width=f,
    vocab_size=abs(v),
    max_seq_len=context,
    dtype="float32",
  )
  h = d // n
  shapes = {
    "embed": (v, d),
    "rms_att": (l, d),
    "wq": (l, n * h, d),
    "wk": (l, k * h, d),
    "wv": (l, k * h, d),
    "wo": (l, d, n * h),
    "rms_ffn": (l, d),
    "w1": (l, f, d),
    "w2": (l, d, f),
    "w3": (l, f, d),
    "rms_final": (d,),
  }
  values, at, tensors = np.frombuffer(data[28:], np.float32), 0, {}
  for name, shape in shapes.items():
    array = values[at : at + np.prod(shape)].reshape(shape)
    at += array.size
    if name in ("wq", "wk"):  # pairs (0, 1), (2, 3) … become (0, h/2), (1, h/2 + 1) …
      array = array.reshape(l, -1, h // 2, 2, d).swapaxes(2, 3).reshape(shape)
    if shape[0] == l:
      tensors |= {f"{name}.{i}": array[i] for i in range(l)}
    else:
      tensors[name] = array
  return config, tensors


def read_tokenizer(path, vocab_size: int) -> SentencePiece:
  """Turns llama2.c's list of (score, piece) into a SentencePiece model."""
  data = path.read_bytes()
  proto, at = spm.ModelProto(), 4
  for i in range(vocab_size):
    score, length = struct.unpack("<fi", data[at : at + 8])
    piece = data[at + 8 : at + 8 + length].decode()
    at += 8 + length
    kind = spm.ModelProto.SentencePiece.NORMAL
    if i < 3:
      kind = spm.ModelProto.SentencePiece.UNKNOWN if i == 0 else 3  # 3: CONTROL
      piece = ("<unk>", "<s>", "</s>")[i]
    elif i < 259:
      kind, piece = 6, f"<0x{i - 3:02X}>"  # 6: BYTE
    proto.pieces.add(piece=piece.replace(" ", "▁"), score=score, type=kind)
  proto.trainer_spec.model_type = 2  # BPE
  proto.trainer_spec.byte_fallback = True
  proto.trainer_spec.vocab_size = vocab_size
  proto.normalizer_spec.name = "identity"
  proto.normalizer_spec.add_dummy_prefix = True
  proto.normalizer_spec.remove_extra_whitespaces = False
  return SentencePiece(proto.SerializeToString())


@pytest.fixture(scope="module")
def stories(shared_data):
  folder = shared_data / "stories260K"
  config, tensors = read_bin(folder / "stories260K.bin")
  tokenizer = read_tokenizer(folder / "tok512.bin", config.vocab_size)
  expected = json.loads((folder / "expected.json").read_text())
  return Model(config, from_tensors(config, tensors, TABLE), tokenizer), expected


def test_greedy_text_is_the_published_one_to_the_character(stories):
  model, expected = stories
  made = generate(model, [""], Sampling(temperature=0, max_tokens=len(expected["greedy_ids"]) - 1))
  assert [1, *made[0].ids] == expected["greedy_ids"]
  assert made[0].text == expected["published_greedy_text"]


def test_a_prompt_goes_on_with_its_space_also_in_pieces(stories):
  model, expected = stories
  prompt, sampling = "Once upon a time, there was a", Sampling(temperature=0, max_tokens=60)
  made = generate(model, [prompt], sampling)[0]
  assert made.text.startswith(" little girl named Lily.")
  assert expected["published_greedy_text"].startswith(prompt + made.text)
  assert "".join(stream(model, prompt, sampling)) == made.text


def test_logits_and_encoding_are_the_published_ones(stories):
  model, expected = stories
  ids = [1, *model.tokenizer.encode(expected["encode_example"]["text"])]
  assert ids == expected["encode_example"]["ids"]
  logits = np.asarray(model.logits([ids]))[0]
  assert logits.argmax(-1).tolist() == expected["logits_argmax"]
  # Published to five decimals.
  np.testing.assert_allclose(logits[-1, :16], expected["logits_last_first16"], atol=2e-4)


def test_loss_on_stories_is_the_published_one(stories, shared_data):
  model, expected = stories
  want = expected["nll_tinystories_excerpt"]
  text = (shared_data / want["file"]).read_text()
  pieces = re.split(r"\n\n(?=Once upon a time|One day, )", text)
  total, count = 0.0, 0
  told = [piece for piece in pieces if piece.startswith("Once upon a time")]
  for story in told[: want["n_stories"]]:
    ids = np.array([1, *model.tokenizer.encode(story)][: want["max_len"]])
    padded = np.pad(ids, (0, want["max_len"] - len(ids)))  # one shape, compiled once; causal
    logits = np.asarray(model.logits(padded[None]), np.float64)[0, : len(ids) - 1]
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    total -= logp[np.arange(len(ids) - 1), ids[1:]].sum()
    count += len(ids) - 1
  assert count == want["tokens"]
  np.testing.assert_allclose(total / count, want["nll_per_token"], rtol=1e-5)
