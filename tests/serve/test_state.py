"""Proves that a row writes the same wherever, whenever and beside whatever it is decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.kinds import apply_kinds, merged
from llmjax.models.model import Model, cast_weights
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.moe import MoeConfig
from llmjax.nn.position import PositionConfig
from llmjax.serve import generate as serving
from llmjax.serve.prompt import Prompts
from llmjax.serve.sample import RowSampling, Sampling, draw, penalize
from llmjax.serve.state import (
  DecodeState,
  check_chunks,
  empty_state,
  free,
  insert,
  prefill,
  run_steps,
  step,
  truncate,
)
from llmjax.training.objective import token_logprobs
from tests.reference.sampling import distribution

pytestmark = pytest.mark.usefixtures("quick_module")

WINDOW, CONTEXT, NEW = 4, 32, 9
SLOTS = 20  # of prefilled rows, fewer than the CONTEXT of the state that they are inserted into
CONFIG = ModelConfig(
  layers=2, width=16, heads=2, mlp_width=24, vocab_size=19, max_seq_len=CONTEXT, dtype="float32",
  tie_embeddings=False,
  attention=AttentionConfig(pattern=("window", "full"), window=WINDOW),
)
# One, one, four and three chunks: after its own a row reads chunks of nothing but padding.
LONG = [7, 2, 8, 4, 6, 1, 1, 12, 18, 3, 5]
PROMPTS = [[1, 5, 9], [3], LONG, LONG[:7]]
SAMPLINGS = [
  Sampling(temperature=0, max_tokens=NEW),
  Sampling(temperature=1.5, top_p=0.9, max_tokens=NEW, seed=3),
  Sampling(temperature=1.0, min_p=0.01, repetition_penalty=1.3, max_tokens=NEW, seed=4),
  Sampling(temperature=0.9, top_k=5, max_tokens=NEW, seed=5),
]
DROPPED = len(PROMPTS)  # where `insert` puts rows that nobody wants


def random_model(config: ModelConfig, std: float) -> Model:
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * std, jnp.float32)  # noqa: E731
  return Model(config, jax.tree.map(draw, abstract(config)))


@pytest.fixture(scope="module")
def model() -> Model:
  return random_model(CONFIG, 0.5)


@jax.jit
def next_token(weights, row_u, length, sampling):
  """One row read without a cache: (the token after `length`, all logprobs, the trainer's)."""
  batch = Batch(row_u[None, :-1])
  logits_tv = weights.logits(weights.hidden(batch)[0])[0]
  logits_bv = logits_tv[length - 1][None]
  is_read_u = jnp.arange(len(row_u)) < length
  seen_bv = jnp.zeros(logits_bv.shape, bool).at[0, row_u].max(is_read_u)
  scores_bv = penalize(logits_bv, seen_bv, sampling.penalty_b)
  trained_bt = token_logprobs(
    weights, dataclasses.replace(batch, targets_bt=row_u[None, 1:]), chunk=8
  )
  token_b = draw(scores_bv, sampling, length[None])
  return token_b[0], jax.nn.log_softmax(logits_tv, axis=-1), trained_bt[0]


def write_uncached(model, prompt, sampling) -> tuple[list[int], list[float], list[float]]:
  """What a prompt is continued with: (ids, logprobs of the model, the trainer's)."""
  row_u, count = np.zeros(CONTEXT + 1, np.int32), len(prompt)
  row_u[:count] = prompt
  for length in range(count, count + NEW):
    row_u[length], *_ = next_token(model.parameters, row_u, np.int32(length), sampling)
  _, all_tv, trained_t = next_token(model.parameters, row_u, np.int32(count), sampling)
  ids_t, at_t = row_u[count : count + NEW], np.arange(count - 1, count + NEW - 1)
  return ids_t.tolist(), np.asarray(all_tv)[at_t, ids_t], np.asarray(trained_t)[at_t]


@pytest.fixture(scope="module")
def written(model) -> list[tuple]:
  """What each prompt is continued with by itself, every token read anew without a cache."""
  found = []
  for n, prompt in enumerate(PROMPTS):
    found.append(write_uncached(model, prompt, prompts_of(model, [n])[2]))
  assert all(len(set(ids)) > 3 for ids, *_ in found)
  return found


def prompts_of(model, numbers) -> tuple:
  """What `prefill` takes of some of the prompts, as `generate_ids` would give it."""
  prompts, count = Prompts([PROMPTS[n] for n in numbers]), len(numbers)
  sampling = RowSampling.of(
    [SAMPLINGS[n] for n in numbers], [()] * count, serving._salts(model, prompts)
  )
  return model.decoding, serving._batch(prompts, CONTEXT), sampling, np.full(count, NEW, np.int32)


def read(model, numbers=(0, 1, 2, 3)) -> DecodeState:
  """Four prompts as one batch, in chunks of three tokens."""
  return prefill(*prompts_of(model, numbers), slots=SLOTS, chunk=3)


def steps(model, state, count):
  """(state, tokens_bt, logprobs_bt) of so many steps; the state that is given is used up."""
  going_b = np.ones(len(state.token_b), bool)
  state, *new = run_steps(model.decoding, state, np.int32(count), going_b, most=NEW - 1)
  return state, *map(np.asarray, new)


def test_rows_of_one_batch_write_what_they_write_alone(model, written):
  """Prompts in chunks, in other places, each with its own sampling; ids and logprobs.

  Logprobs are those of the model and of the trainer, whatever temperature and penalty drew the
  tokens: all in fp32, sums in another order.
  """
  rows, at_b = read(model), np.array([3, 1, 0, 2])
  first_b, first_logprob_b = np.array(rows.token_b), np.array(rows.logprob_b)
  window, full = rows.cache.layers
  assert window.key_bksh.shape[2] == WINDOW and full.key_bksh.shape[2] == SLOTS
  assert [sorted(set(row.tolist()) - {-1}) for row in rows.cache.positions["window"]] == [
    list(range(max(0, len(row) - WINDOW), len(row))) for row in PROMPTS
  ]
  state = insert(empty_state(model.decoding, len(PROMPTS), CONTEXT), rows, at_b)
  state, tokens_bt, logprobs_bt = steps(model, state, NEW - 1)
  ids_bt = np.column_stack([first_b, tokens_bt[at_b]])
  logprobs_bt = np.column_stack([first_logprob_b, logprobs_bt[at_b]])
  for ids_t, logprobs_t, (ids, scores_t, trained_t) in zip(
    ids_bt, logprobs_bt, written, strict=True
  ):
    assert ids_t.tolist() == ids
    assert_allclose(logprobs_t, scores_t, atol=1e-5)
    assert_allclose(logprobs_t, trained_t, atol=1e-5)
  assert not np.any(state.left_b)


def test_rows_come_and_go_between_steps(model, written):
  """The greedy row is inserted first; the long one joins later; the next takes a freed slot."""
  state, found = empty_state(model.decoding, len(PROMPTS), CONTEXT), {}

  def add(number, at):
    rows, at_b = read(model), np.full(len(PROMPTS), DROPPED)
    found[number] = [int(rows.token_b[number])]
    at_b[number] = at
    return insert(state, rows, at_b)

  state, tokens_bt, _ = steps(model, add(0, 2), 4)
  assert (tokens_bt[[0, 1, 3]] == -1).all()  # free rows write nothing
  found[0] += tokens_bt[2, :4].tolist()
  state, tokens_bt, _ = steps(model, add(2, 0), 2)
  found[0] += tokens_bt[2, :2].tolist()
  found[2] += tokens_bt[0, :2].tolist()
  state = free(state, 2)
  assert not np.any(state.cache.positions["full"][2] >= 0) and not state.left_b[2]
  state, tokens_bt, _ = steps(model, add(1, 2), NEW - 1)
  assert (tokens_bt[[1, 3]] == -1).all()
  for number, at in ((1, 2), (2, 0)):
    found[number] += [t for t in tokens_bt[at].tolist() if t >= 0]
  assert (found[1], found[2]) == (written[1][0], written[2][0])
  assert found[0] == written[0][0][: len(found[0])] and len(found[0]) == 7


def test_rows_with_more_slots_than_the_state_are_refused(model):
  states = [jax.eval_shape(lambda n=n: empty_state(model.decoding, 4, n)) for n in (20, 32)]
  with pytest.raises(UserError, match="rows of 32 slots do not fit into a state of 20"):
    jax.eval_shape(insert, *states, np.arange(4))


def test_rejected_draft_tokens_leave_no_trace(model, written):
  drafted, count = 3, len(PROMPTS)

  @jax.jit
  def draft(weights, state):
    """Reads three wrong tokens and drops them: (the state, each row's keys in between)."""
    # Beside a whole window they do not fit into a ring of one window: draft into a larger one.
    resized = lambda cache, chunk: cache.resize(  # noqa: E731
      jax.eval_shape(lambda: weights.decoder.empty_cache(count, CONTEXT, chunk))
    )
    positions_bt = state.length_b[:, None] + jnp.arange(drafted)
    wrong = Batch(jnp.full(positions_bt.shape, 9), positions_bt=positions_bt)
    _, cache, _ = weights.hidden(wrong, resized(state.cache, drafted))
    keys_b = (cache.positions["full"] >= 0).sum(axis=1)
    state = truncate(dataclasses.replace(state, cache=cache), state.length_b, state.token_b)
    return dataclasses.replace(state, cache=resized(state.cache, 1)), keys_b

  rows = read(model)
  found = np.array(rows.token_b)[:, None]
  state = insert(empty_state(model.decoding, count, CONTEXT), rows, np.arange(count))
  state, tokens_bt, _ = steps(model, state, 3)
  state, keys_b = draft(model.decoding, state)
  assert_array_equal(keys_b, state.length_b + drafted)
  assert_array_equal(np.sum(state.cache.positions["full"] >= 0, axis=1), state.length_b)
  _, rest_bt, _ = steps(model, state, NEW - 1)
  found = np.column_stack([found, tokens_bt[:, :3], rest_bt[:, : NEW - 4]])
  assert found.tolist() == [ids for ids, *_ in written]


def test_equal_prompts_are_samples_and_the_first_is_as_alone(model, written):
  """Their keys differ by how many equal prompts stand before them, and so does what is drawn."""
  rows = read(model, [1, 1, 0, 1])
  keys = jax.random.key_data(rows.sampling.key_b).tolist()
  assert len({tuple(key) for key in keys}) == 4
  assert keys[0] == jax.random.key_data(prompts_of(model, [1])[2].key_b)[0].tolist()
  assert rows.token_b[0] == written[1][0][0] and rows.token_b[2] == written[0][0][0]
  state = insert(empty_state(model.decoding, len(PROMPTS), CONTEXT), rows, np.arange(4))
  tokens_bt = steps(model, state, NEW - 1)[1]
  assert tokens_bt[0].tolist() == written[1][0][1:]
  assert len({tuple(tokens_bt[n]) for n in (0, 1, 3)}) == 3


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


def test_tokens_follow_the_distribution_of_their_rows_sampling(model):
  """4,000 rows, four kinds of sampling in one batch; the second token of each, after a step."""
  kinds = [
    Sampling(temperature=0.7), Sampling(top_k=4), Sampling(top_p=0.7), Sampling(min_p=0.1)
  ]
  each = 1000
  samplings = [dataclasses.replace(k, seed=n) for k in kinds for n in range(each)]
  rows = RowSampling.of(samplings, [()] * len(samplings))

  @jax.jit
  def tokens_after(weights, state, rows):
    """Every row is the first of a state, but for its sampling."""
    state = dataclasses.replace(state, sampling=None)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], len(samplings), axis=0), state)
    return step(weights, dataclasses.replace(state, sampling=rows))[1]

  state = read(model)
  first = int(state.token_b[0])
  drawn = np.asarray(tokens_after(model.decoding, state, rows)).reshape(len(kinds), each)
  row_u = np.array([*PROMPTS[0], first] + [0] * (CONTEXT - 3), np.int32)
  greedy = prompts_of(model, [0])[2]
  scores = next_token(model.parameters, row_u, np.int32(4), greedy)[1][3].tolist()
  for tokens, kind in zip(drawn, kinds, strict=True):
    expected = np.array(distribution(scores, kind.temperature, kind.top_k, kind.top_p, kind.min_p))
    counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
    likely = expected * each > 5  # what chi-squared asks for; the others count as one
    assert counts[expected == 0].sum() == 0 and likely.sum() > 2
    table = [np.append(a[likely], a[~likely].sum()) for a in (counts, expected * each)]
    table = [a[:-1] if table[1][-1] == 0 else a for a in table]
    assert stats.chisquare(*table).pvalue > 1e-4


def test_matrices_are_cast_once_and_what_is_read_in_fp32_is_not():
  """Logits are equal bit by bit, so nothing is cast that a product does not cast itself."""
  config = dataclasses.replace(
    CONFIG, layers=1, dtype="bfloat16", moe=MoeConfig(experts=2),
    attention=AttentionConfig(), position=PositionConfig(kind="relative"),
  )
  values = random_model(config, 0.1).parameters
  low = jax.jit(lambda model: cast_weights(model, jnp.bfloat16))(values)
  cast = {
    path.rsplit("/", 1)[-1] for path, leaf in tree.flatten(low).items()
    if leaf.dtype == jnp.bfloat16
  }
  assert {"token_vd", "query_dnh", "up_edf"} <= cast
  assert not {"router_de", "relative_in", "scale_d"} & cast
  run = jax.jit(lambda model: model.logits(model.hidden(Batch(jnp.array([LONG])))[0]))
  assert_array_equal(run(values), run(low))


def test_quantized_weights_and_adapters_write_what_their_merged_weights_write():
  """QLoRA on every matrix; the codes stay codes, and int8 ones int8, in any compute dtype."""
  nf4 = {"kind": "lora", "rank": 2, "base": {"kind": "nf4", "block": 8}}
  plain = dataclasses.replace(CONFIG, layers=1, attention=AttentionConfig())
  config = dataclasses.replace(plain, weights=(("*", nf4),))

  @jax.jit
  def both(arrays):
    weights = apply_kinds(arrays, config.weights, jax.random.key(0))
    weights = tree.map_with_path(  # b is zero in a new adapter
      lambda path, leaf: leaf + 0.3 if "/b_a" in path else leaf, weights
    )
    return weights, merged(weights)

  @jax.jit
  def write(weights, *prompts):
    state = prefill(weights, *prompts, slots=SLOTS)
    return jax.lax.scan(lambda state, _: step(weights, state)[:2], state, None, 4)[1][:, 0]

  arrays = random_model(plain, 0.5).parameters
  weights, full = both(arrays)
  assert jax.tree.structure(full) == jax.tree.structure(arrays)
  decoding, *prompts = prompts_of(Model(config, weights), [0])
  want, *_ = write_uncached(Model(plain, full), PROMPTS[0], prompts[1])
  assert write(decoding, *prompts).tolist() == want[1:5] and len(set(want)) > 3
  int8 = abstract(dataclasses.replace(plain, weights=(("*", {"kind": "int8"}),)))
  for kinds, base, code in ((weights, "base_df/", jnp.uint8), (int8, "", jnp.int8)):
    low = jax.eval_shape(lambda model: cast_weights(model, jnp.bfloat16), kinds)
    low = tree.flatten(low.decoder.blocks.mlp)
    assert low[f"up_df/{base}codes_df"].dtype == code
    dtypes = {path: leaf.dtype for path, leaf in low.items()}
    assert all(dtypes[path] == jnp.bfloat16 for path in dtypes if "up_df/a_d" in path)
    assert all(dtypes[path] == jnp.float32 for path in dtypes if path.endswith("scale_f"))
