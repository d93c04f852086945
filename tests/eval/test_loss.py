"""Proves that bits per byte are those of scoring token after token, and checks gzip and xz."""

import dataclasses
import gzip
import lzma
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_allclose

from llmjax.data.prepare import prepare
from llmjax.data.sources import Document
from llmjax.eval import loss
from llmjax.eval.loss import compressor_bits_per_byte, evaluate_loss, plan_batches
from llmjax.models.build import abstract
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.text.sentencepiece import SentencePiece

DOCUMENTS = [
  Document("s", "long", "the quick brown fox jumps over the lazy dög\n" * 2),
  Document("s", "short", "dog"),
  Document("s", "other", "▁ the fox is brown, the dög is quick\n"),
]
CONTEXT = 16


@pytest.fixture(scope="module")
def tokenizer():
  return SentencePiece.train([document.text * 20 for document in DOCUMENTS], 320)


@pytest.fixture(scope="module")
def decoder(tiny_config, tokenizer):
  """A decoder of the tokenizer's vocabulary, its head sharp enough that tokens differ."""
  config = dataclasses.replace(tiny_config, vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.16, jnp.float32), abstract(config)
  )


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
  return prepare(DOCUMENTS, tokenizer, tmp_path_factory.mktemp("store"))


def naive_nats(decoder, tokenizer, stride):
  """-log p of each token given what stands before it, one forward pass a token.

  The first `CONTEXT` predictions of a document start from its beginning; each later group of
  `stride` starts so many tokens later.
  """
  run = jax.jit(lambda decoder, tokens: decoder(tokens)[0])
  total = 0.0
  for document in DOCUMENTS:
    ids = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    for place in range(1, len(ids)):
      groups_later = max(0, math.ceil((place - CONTEXT) / stride))
      context = ids[groups_later * stride : place]
      row = np.zeros((1, CONTEXT), np.int32)
      row[0, : len(context)] = context
      scores = np.asarray(run(decoder, row)[0, len(context) - 1], np.float64)
      total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[ids[place]]
  return total


@pytest.mark.parametrize(("stride", "meant"), [(0, 8), (5, 5), (16, 16), (99, 16)])
def test_bits_per_byte_are_those_of_scoring_each_token_alone(
  decoder, tokenizer, store, stride, meant
):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  found = evaluate_loss(decoder, store, mesh, batch_size=4, stride=stride)
  size_bytes = sum(len(document.text.encode()) for document in DOCUMENTS)
  tokens = sum(len(tokenizer.encode(document.text)) + 1 for document in DOCUMENTS)
  nats = naive_nats(decoder, tokenizer, meant)
  assert (found["bytes"], found["tokens"]) == (size_bytes, tokens)
  assert nats / tokens > 5  # an untrained model, but not a uniform one: log(320) is 5.77
  # Logits of order 3 in fp32 through two layers, some hundred of them summed.
  assert_allclose(found["nats_per_token"], nats / tokens, rtol=2e-6)
  assert_allclose(found["bits_per_byte"], nats / math.log(2) / size_bytes, rtol=2e-6)
  assert_allclose(found["perplexity"], math.exp(nats / tokens), rtol=2e-5)


def test_the_loss_does_not_depend_on_the_batch_size_and_the_width_of_rows(
  decoder, store, monkeypatch
):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  one, *others = (evaluate_loss(decoder, store, mesh, batch_size=size) for size in (4, 3))
  monkeypatch.setattr(loss, "_UNIT", 4)
  monkeypatch.setattr(loss, "_CPU_POSITIONS", 32)  # two rows of the context
  planned, plan = [], loss.plan_batches
  monkeypatch.setattr(loss, "plan_batches", lambda *a: planned.append(plan(*a)) or planned[-1])
  others.append(evaluate_loss(decoder, store, mesh))
  assert {batch.rows for batch in planned[0]} == {2}
  assert len({batch.width for batch in planned[0]}) > 1
  for other in others:  # the same rows in other sums
    assert_allclose(one["nats_per_token"], other["nats_per_token"], rtol=1e-6)
    assert one["tokens"] == other["tokens"]


@settings(deadline=None, max_examples=100)
@given(
  st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 20),
  st.sampled_from([1, 2, 8]),
)
def test_batches_hold_every_row_once_in_few_shapes_and_little_padding(needs, batch_size, shards):
  context, unit = 1000, 16
  batches = plan_batches(needs, batch_size, shards, unit, context)
  assert sorted(n for batch in batches for n in batch.numbers) == list(range(len(needs)))
  for batch in batches:
    longest = max(needs[number] for number in batch.numbers)
    assert longest <= batch.width <= context and (batch.width % unit == 0 or batch.width == context)
    assert batch.width < 2 * longest + unit
    assert len(batch.numbers) <= batch.rows <= batch_size + shards - 1 and batch.rows % shards == 0
  assert len({batch.rows for batch in batches}) == 1
  assert len({batch.width for batch in batches}) <= 8  # each at most about half of the one before
  # Padding rows: less than a row, rounded up to the shards, for each batch.
  assert sum(batch.rows for batch in batches) < len(needs) + len(batches) * shards


def test_one_short_text_costs_what_it_is_long():
  (batch,) = plan_batches([4511], 16, 1, 128, 8192)
  assert (batch.rows, batch.width) == (1, 4608)


def test_compressors_are_measured_on_all_documents_as_one_stream():
  found = compressor_bits_per_byte(DOCUMENTS)
  data = "".join(document.text for document in DOCUMENTS).encode()
  assert found == {
    "gzip_bits_per_byte": len(gzip.compress(data, compresslevel=9)) * 8 / len(data),
    "xz_bits_per_byte": len(lzma.compress(data, preset=9)) * 8 / len(data),
  }
