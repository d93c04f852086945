"""Proves that a row writes the same wherever, whenever and beside whatever it is decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model, cast_weights
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.moe import MoeConfig
from llmjax.serve import generate as serving
from llmjax.serve.generate import generate_ids
from llmjax.serve.prompt import Prompts
from llmjax.serve.sample import RowSampling, Sampling
from llmjax.serve.state import (
  check_chunks,
  empty_state,
  free,
  insert,
  prefill,
  run_steps,
  truncate,
)
from llmjax.training.objective import token_logprobs
from tests.reference.sampling import distribution

pytestmark = pytest.mark.usefixtures("quick_module")

WINDOW, CONTEXT, NEW = 4, 32, 9
CONFIG = ModelConfig(
  layers=2, width=16, heads=2, mlp_width=24, vocab_size=19, max_seq_len=CONTEXT, dtype="float32",
  tie_embeddings=False,
  attention=AttentionConfig(pattern=("window", "full"), window=WINDOW),
)
PROMPTS = [[1, 5, 9], [3], [7, 2, 8, 4, 6, 1, 1, 12, 18, 3, 5]]
SAMPLINGS = [
  Sampling(temperature=0, max_tokens=NEW),
  Sampling(temperature=1.5, top_p=0.9, max_tokens=NEW, seed=3),
  Sampling(temperature=1.0, min_p=0.01, repetition_penalty=1.3, max_tokens=NEW, seed=4),
]


@pytest.fixture(scope="module")
def model() -> Model:
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), abstract(CONFIG)
  )
  return Model(CONFIG, values)


@pytest.fixture(scope="module")
def written(model) -> list[list[tuple[int, float]]]:
  """(id, logprob) of what each prompt is continued with by itself."""
  found = []
  for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
    pieces = serving._steps(model, Prompts([prompt]), sampling, (), None)
    found.append([pair for [new] in pieces for pair in zip(*new, strict=True)])
  assert all(len({i for i, _ in row}) > 3 for row in found)
  return found


@pytest.fixture(scope="module")
def alone(written) -> list[list[int]]:
  return [[i for i, _ in row] for row in written]


def begin(model, numbers, slots=CONTEXT, chunk=None):
  """The prefilled state of some of the prompts, as `generate_ids` would read each alone."""
  prompts = Prompts([PROMPTS[n] for n in numbers])
  sampling = RowSampling.of(
    [SAMPLINGS[n] for n in numbers], [()] * len(numbers), serving._salts(model, prompts)
  )
  batch, left_b = serving._batch(prompts, CONTEXT), np.full(len(numbers), NEW, np.int32)
  return prefill(model.decoding, batch, sampling, left_b, slots=slots, chunk=chunk)


def steps(model, state, count):
  """(state, tokens_bt) of so many steps."""
  going_b = np.ones(len(state.token_b), bool)
  state, tokens_bt, _ = run_steps(model.decoding, state, np.int32(count), going_b, most=NEW - 1)
  return state, np.asarray(tokens_bt)


def full_logprobs(model, row):
  """log_softmax of the logits of a row, read at once without a cache."""
  padded = np.array([row + [0] * (CONTEXT - len(row))], np.int32)
  return np.asarray(jax.nn.log_softmax(model.logits(padded), axis=-1))[0, : len(row)]


def test_rows_of_different_sampling_write_in_one_batch_what_they_write_alone(model, alone):
  state = begin(model, [2, 0, 1])
  first_b = np.asarray(state.token_b)
  state, tokens_bt = steps(model, state, NEW - 1)
  found = [[first, *row[row >= 0].tolist()] for first, row in zip(first_b, tokens_bt, strict=True)]
  assert found == [alone[2], alone[0], alone[1]]
  assert not np.any(state.left_b)


def test_rows_come_and_go_between_steps(model, alone):
  """The greedy row is inserted first; the long one joins later; the third takes a freed place."""
  state = empty_state(model.decoding, 3, CONTEXT)
  row = begin(model, [0])
  written = {0: [int(row.token_b[0])]}
  state, tokens_bt = steps(model, insert(state, row, np.array([2])), 4)
  assert (tokens_bt[:2] == -1).all()  # free rows write nothing
  written[0] += tokens_bt[2, :4].tolist()
  row = begin(model, [2], slots=20, chunk=3)
  written[2] = [int(row.token_b[0])]
  state, tokens_bt = steps(model, insert(state, row, np.array([0])), 2)
  written[0] += tokens_bt[2, :2].tolist()
  written[2] += tokens_bt[0, :2].tolist()
  state = free(state, 2)
  assert not np.any(state.cache.positions["full"][2] >= 0) and not state.left_b[2]
  row = begin(model, [1, 0, 2])  # of which only the first is wanted
  written[1] = [int(row.token_b[0])]
  state, tokens_bt = steps(model, insert(state, row, np.array([2, 3, 3])), NEW - 1)
  for number, place in ((1, 2), (2, 0)):
    written[number] += [t for t in tokens_bt[place].tolist() if t >= 0]
  assert (written[1], written[2]) == (alone[1], alone[2])
  assert written[0] == alone[0][: len(written[0])] and len(written[0]) == 7
  with pytest.raises(UserError, match="rows of 32 slots do not fit into a state of 20"):
    insert(begin(model, [2], slots=20, chunk=3), row, np.array([0, 3, 3]))


def test_rejected_draft_tokens_leave_no_trace(model, alone):
  state, tokens_bt = steps(model, begin(model, [0]), 3)
  length_b, token_b, drafted = state.length_b, state.token_b, 3
  # Three more keys do not fit beside a whole window into a ring of one window: draft into more.
  roomy = jax.eval_shape(lambda: model.decoding.empty_cache(1, CONTEXT, drafted))
  cache = state.cache.resize(roomy)
  positions_bt = np.asarray(length_b)[:, None] + np.arange(drafted)
  garbage = Batch(np.array([[9, 9, 9]]), positions_bt=positions_bt)
  _, cache, _ = jax.jit(lambda model, *given: model.hidden(*given))(model.decoding, garbage, cache)
  assert np.sum(cache.positions["full"] >= 0) == int(length_b[0]) + drafted
  state = truncate(dataclasses.replace(state, cache=cache), length_b, token_b)
  assert np.sum(state.cache.positions["full"] >= 0) == int(length_b[0])
  _, rest_bt = steps(model, state, NEW - 1)
  found = [t for row in (tokens_bt, rest_bt) for t in row[0].tolist() if t >= 0]
  assert found == alone[0][1:]


def test_window_layers_keep_a_ring_of_their_window(model):
  state = begin(model, [0, 1, 2])
  window, full = state.cache.layers
  assert window.key_bksh.shape[2] == WINDOW and full.key_bksh.shape[2] == CONTEXT
  lengths = [3, 1, 11]
  assert [sorted(set(row.tolist()) - {-1}) for row in state.cache.positions["window"]] == [
    list(range(max(0, n - WINDOW), n)) for n in lengths
  ]


def test_prompts_in_chunks_are_the_prompts_at_once(model, alone):
  # One, three and four chunks; after its own a row reads chunks of nothing but padding.
  prompts = [PROMPTS[0], PROMPTS[2][:7], PROMPTS[2]]
  found = generate_ids(model, prompts, SAMPLINGS[0], prefill_chunk=3)
  assert found == generate_ids(model, prompts, SAMPLINGS[0])
  assert found[0] == alone[0]
  with pytest.raises(UserError, match="prefill_chunk 1 is less than 2"):
    generate_ids(model, PROMPTS, SAMPLINGS[0], prefill_chunk=1)


@pytest.mark.parametrize(
  ("values", "reason"),
  [
    ({"attention": AttentionConfig(mask="prefix")}, "mask=prefix"),
    ({"moe": MoeConfig(experts=2, router="expert_choice", capacity=1.0)}, "expert_choice"),
    ({"moe": MoeConfig(experts=2, capacity=1.0)}, "moe.capacity"),
  ],
)
def test_a_prompt_that_must_be_read_at_once_is_not_cut(values, reason):
  with pytest.raises(UserError, match=reason):
    check_chunks(dataclasses.replace(CONFIG, **values))
  check_chunks(CONFIG)
  with pytest.raises(UserError, match="images"):
    check_chunks(CONFIG, has_images=True)


def test_logprobs_are_those_of_the_model_and_of_the_trainer(model, written):
  """Whatever temperature and penalty drew the tokens; all in fp32, sums in another order."""
  trainer = jax.jit(lambda model, batch: token_logprobs(model, batch, chunk=8))
  for prompt, new in zip(PROMPTS, written, strict=True):
    row = prompt + [i for i, _ in new]
    padded = np.array([row + [0] * (CONTEXT + 1 - len(row))], np.int32)
    trained = trainer(model.parameters, Batch(padded[:, :-1], targets_bt=padded[:, 1:]))
    new_places = slice(len(prompt) - 1, len(row) - 1)
    assert_allclose([logprob for _, logprob in new], trained[0, new_places], atol=1e-5)
    scores = full_logprobs(model, prompt + [i for i, _ in new])
    want = [scores[len(prompt) - 1 + n, i] for n, (i, _) in enumerate(new)]
    assert_allclose([logprob for _, logprob in new], want, atol=1e-5)


def test_equal_prompts_are_samples_and_the_first_is_as_alone(model):
  sampling = Sampling(temperature=2.0, max_tokens=NEW, seed=5)
  many = generate_ids(model, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], sampling)
  assert many[0] != many[1]
  assert [many[0]] == generate_ids(model, PROMPTS[:1], sampling)
  assert [many[2]] == generate_ids(model, PROMPTS[1:2], sampling)


def test_tokens_follow_the_distribution_of_their_rows_sampling(model):
  """4,000 rows, four kinds of sampling in one batch; the second token of each, after a step."""
  kinds = [
    Sampling(temperature=0.7), Sampling(top_k=4), Sampling(top_p=0.7), Sampling(min_p=0.1)
  ]
  each = 1000
  samplings = [dataclasses.replace(k, seed=n) for k in kinds for n in range(each)]
  prompt = PROMPTS[0]
  count = len(samplings)
  tokens_bt = np.tile(np.array(prompt, np.int32), (count, 1))
  batch = Batch(tokens_bt, segments_bt=np.ones_like(tokens_bt))
  rows = RowSampling.of(samplings, [()] * count)
  state = prefill(model.decoding, batch, rows, np.full(count, 2, np.int32), slots=8)
  first_b = np.full(count, 11, np.int32)  # the same for all, whatever was drawn
  state = dataclasses.replace(state, token_b=jnp.asarray(first_b))
  drawn = steps(model, state, 1)[1][:, 0].reshape(len(kinds), each)
  logits = full_logprobs(model, [*prompt, 11])[-1].tolist()
  for tokens, kind in zip(drawn, kinds, strict=True):
    expected = np.array(distribution(logits, kind.temperature, kind.top_k, kind.top_p, kind.min_p))
    counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
    likely = expected * each > 5  # what chi-squared asks for; the others count as one
    assert counts[expected == 0].sum() == 0 and likely.sum() > 2
    table = [np.append(a[likely], a[~likely].sum()) for a in (counts, expected * each)]
    table = [a[:-1] if table[1][-1] == 0 else a for a in table]
    assert stats.chisquare(*table).pvalue > 1e-4


def test_matrices_are_cast_once_and_what_is_read_in_fp32_is_not():
  config = dataclasses.replace(CONFIG, layers=1, dtype="bfloat16", moe=MoeConfig(experts=2))
  weights = jax.eval_shape(lambda model: cast_weights(model, jnp.bfloat16), abstract(config))
  low = {
    jax.tree_util.keystr(path).rsplit(".", 1)[-1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights) if leaf.dtype == jnp.bfloat16
  }
  assert {"token_vd", "query_dnh", "up_edf"} <= low
  assert not {"router_de", "scale_d"} & low
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.1, jnp.float32), abstract(config)
  )
  run = jax.jit(lambda model: model.logits(model.hidden(Batch(jnp.array([PROMPTS[2]])))[0]))
  assert_array_equal(run(values), run(cast_weights(values, jnp.bfloat16)))
