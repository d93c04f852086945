"""Proves that latent attention says the same from its cache, absorbed or expanded, as of a row."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models.formulas import cache_bytes_per_token
from llmjax.models.model import Model
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.latent import LatentAttention, LatentConfig
from llmjax.nn.attention.mask import MaskSpec, self_mask
from llmjax.serve.generate import generate_ids
from llmjax.serve.sample import Sampling
from llmjax.serve.state import empty_state, run_steps
from tests.models.variants import VARIANTS, make_config, weights_of

pytestmark = pytest.mark.usefixtures("quick_module")

CONFIG = VARIANTS["mla"]
LATENT = CONFIG.attention.latent
ROWS = np.random.default_rng(0).integers(0, 38, (2, 12)).astype(np.int32)
# A few hundred fp32 roundings in another order; logits of order 10.
ATOL = 1e-4


@jax.jit
def whole(model, tokens_bt):
  return model.logits(model.hidden(Batch(tokens_bt))[0])


def step(model, tokens_bt, positions_bt, cache):
  x_btd, cache, _ = model.hidden(Batch(tokens_bt, positions_bt=positions_bt), cache)
  return model.logits(x_btd), cache


@pytest.mark.parametrize("cuts", [range(13), (0, 7, 8, 12)])
@pytest.mark.parametrize("absorbed", [True, False])
def test_a_row_read_in_pieces_says_what_the_whole_row_does(cuts, absorbed, monkeypatch):
  monkeypatch.setattr(LatentAttention, "_absorbing_is_cheaper", lambda self, queries: absorbed)
  model, run = weights_of(CONFIG), jax.jit(lambda *given: step(*given))  # traced anew
  cache, said = model.decoder.empty_cache(2, 16), []
  for first, end in itertools.pairwise(cuts):
    places = np.broadcast_to(np.arange(first, end), (2, end - first))
    logits, cache = run(model, ROWS[:, first:end], places, cache)
    said.append(logits)
  assert_allclose(np.concatenate(said, axis=1), whole(model, ROWS), atol=ATOL)


def test_absorbed_and_expanded_are_taken_where_each_costs_less(monkeypatch):
  calls = []
  for name in ("_absorbed", "_expanded"):
    real = getattr(LatentAttention, name)
    spy = lambda *a, name=name, real=real: calls.append(name) or real(*a)  # noqa: E731
    monkeypatch.setattr(LatentAttention, name, spy)
  one = make_config(**{
    "kv_heads": 0, "layers": 1, "attention.latent.kv_rank": 12, "attention.latent.rope_dim": 2,
    "attention.latent.nope_dim": 4, "attention.latent.value_dim": 4,
  })
  model = weights_of(one)  # n queries: 16 n of 24 more channels, against 12 · 8 to expand
  for queries, name in ((1, "_absorbed"), (5, "_absorbed"), (6, "_expanded")):
    batch = Batch(ROWS[:1, :queries], positions_bt=np.arange(queries)[None])
    jax.eval_shape(lambda batch=batch: model.hidden(batch, model.decoder.empty_cache(1, 8)))
    assert calls.pop() == name, queries
  jax.eval_shape(lambda: model.hidden(Batch(ROWS[:1, :1])))
  assert calls == ["_expanded"]  # without a cache there is nothing to save


def test_generation_continues_as_whole_rows_would():
  model = Model(CONFIG, weights_of(CONFIG))
  made = generate_ids(model, [[1, 2, 3], [4, 5, 6, 7, 8]], Sampling(temperature=0.0, max_tokens=6))
  for prompt, new in zip(([1, 2, 3], [4, 5, 6, 7, 8]), made, strict=True):
    row = np.array([prompt + new], np.int32)
    best = np.asarray(whole(model.parameters, row)).argmax(-1)[0]
    assert list(best[len(prompt) - 1 : -1]) == new


def test_the_cache_holds_one_latent_and_one_rotary_key_a_position():
  cache = jax.eval_shape(lambda: weights_of(CONFIG).decoder.empty_cache(2, 16).layers)
  kept = jax.tree.leaves(cache)
  shape = (2, 1, 16, LATENT.kv_rank + LATENT.rope_dim)
  assert [leaf.shape for leaf in kept] == CONFIG.layers * [shape]
  assert sum(leaf.size for leaf in kept) * 4 == 2 * 16 * cache_bytes_per_token(CONFIG, 4)
  # DeepSeek-V2, sec. 2.1.4: as much as 2.25 key/value heads of 128.
  v2 = LatentConfig(512, 1536, 64, 128, 128)
  published = make_config(
    **{"layers": 60, "heads": 128, "kv_heads": 0},
    **{f"attention.latent.{key}": value for key, value in dataclasses.asdict(v2).items()},
  )
  assert cache_bytes_per_token(published) == 60 * 2.25 * 2 * 128 * 2


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"attention.latent.rope_dim": 4}, "latent changes nothing without .*kv_rank"),
    ({"attention.latent.kv_rank": 4}, "latent.rope_dim 0 is less than 2"),
    ({**{f"attention.latent.{key}": 4 for key in ("kv_rank", "rope_dim", "nope_dim")},
      "attention.latent.value_dim": 9}, "value_dim 9 is above nope_dim"),
  ],
)
def test_ranks_and_widths_that_do_not_go_together_are_told(keys, message):
  with pytest.raises(UserError, match=message):
    make_config(kv_heads=0, **keys)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"kv_heads": 2}, r"leave model.kv_heads 2 and model.head_dim 0, or set them to 4 and 11"),
    ({"head_dim": 8}, "leave model.kv_heads 0 and model.head_dim 8"),
    ({"kind": "encoder_decoder"}, "encoder_decoder has no latent attention"),
    ({"position": dataclasses.replace(CONFIG.position, kind="none")}, "position.kind=rope"),
    ({"position": dataclasses.replace(CONFIG.position, fraction=0.5)}, "fraction=1"),
  ],
)
def test_what_latent_attention_does_not_read_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CONFIG, **values)


@pytest.mark.parametrize("key", [{"sinks": True}, {"qk_norm": "head"}, {"bias": "all"}])
def test_additions_of_ordinary_attention_are_refused(key):
  with pytest.raises(UserError, match="has no sinks, qk_norm or bias"):
    dataclasses.replace(CONFIG, attention=AttentionConfig(latent=LATENT, **key))


def test_values_narrower_than_keys_are_padded_for_a_platforms_kernel(monkeypatch):
  from llmjax.nn.attention import kernels
  from llmjax.nn.attention.platform_kernels import cudnn
  from llmjax.nn.attention.scores import Scores

  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, h)), jnp.float32) for h in (8, 8, 5))
  mask = self_mask(MaskSpec(True), None, jnp.arange(6)[None])
  want = kernels.attend(q, k, v, mask, Scores(0.3), "direct")
  monkeypatch.setattr(kernels, "choose", lambda *a: "cudnn")
  monkeypatch.setattr(kernels.platform_kernels, "cudnn", lambda *a: cudnn(*a, implementation="xla"))
  # The same softmax by another program, fp32.
  assert_allclose(kernels.attend(q, k, v, mask, Scores(0.3), "cudnn"), want, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_writes_the_cache_in_place(rows):
  """A copy of it at every token is what a loop pays where it carries another form than it reads."""
  model = Model(CONFIG, weights_of(CONFIG)).decoding
  state = jax.eval_shape(lambda model: empty_state(model, rows, 352), model)
  lowered = run_steps.lower(model, state, jnp.int32(9), np.ones(rows, bool), most=16)
  text = lowered.compile().as_text()
  bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
  parts = re.split(r"\n(?=%|ENTRY)", text)
  loops = [part for part in parts if part.split(" ", 1)[0].lstrip("%") in bodies]
  kept = rf"f32\[(?:{rows},)?(?:1,)?352,{LATENT.kv_rank + LATENT.rope_dim}\]"
  assert any(re.search(kept, loop) for loop in loops)  # the loop is the one that carries it
  assert not [loop for loop in loops if re.search(rf"= {kept}\S* copy\(", loop)]
