"""Proves that any legal config trains a step without leaks, and any other is refused in words.

Configs are drawn from every value there is. The draws are the same on every run.
"""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.nn.moe import MoeConfig
from llmjax.training.config import Config
from llmjax.training.losses import LossConfig
from llmjax.training.optim import OptimConfig, make_optimizer
from llmjax.training.parameters import combine
from tests.gradients import first_step
from tests.models.test_coverage import CHOICES
from tests.models.test_reach import reached
from tests.models.variants import IMAGE, batch_of, inputs, make_config, scored_places, weights_of

pytestmark = pytest.mark.usefixtures("quick_compile", "quick_keys")
COMMON = dict(
  deadline=None, derandomize=True, database=None, print_blob=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture
def quick_keys():
  """PRNG keys whose numbers compile quickly, for dropout."""
  with jax.default_prng_impl("rbg"):
    yield


def often(value, *others):
  """One of several values, half of the time the first."""
  return st.one_of(st.just(value), st.sampled_from(others))


@st.composite
def keys(draw):
  """Dotted keys of a config: every choice, every switch, sizes that fit and some that do not."""
  routed = draw(experts())
  made = {key: draw(st.sampled_from(values)) for key, values in CHOICES.items()}
  # On other machines, and drawn on their own below.
  made["attention.kernel"] = draw(st.sampled_from(("auto", "direct", "blockwise")))
  pattern = draw(st.lists(st.sampled_from(CHOICES["attention.pattern"]), min_size=1, max_size=3))
  made["attention.pattern"] = tuple(pattern)
  made["attention.window"] = draw(st.integers(1, 6)) * ("window" in pattern)
  made |= {
    "layers": draw(st.integers(1, 3)), "encoder_layers": draw(st.integers(0, 2)),
    "width": draw(often(16, 12, 24)), "heads": draw(often(4, 2, 6)),
    "kv_heads": draw(often(0, 2, 1)), "head_dim": draw(often(0, 4, 6)),
    "mlp_width": draw(st.integers(1, 20)), "dropout": draw(often(0.0, 0.4)),
    "attention.sparse_block": draw(st.integers(1, 5)),
    "attention.sparse_local": draw(st.integers(1, 3)),
    "attention.sparse_global": draw(st.integers(0, 2)),
    "attention.sparse_stride": draw(st.integers(0, 3)),
    "attention.softcap": draw(often(0.0, 2.0)), "attention.scale": draw(often(0.0, 0.3)),
    "position.theta": draw(often(10_000.0, 20.0)), "position.local_theta": draw(often(0.0, 30.0)),
    "position.fraction": draw(often(1.0, 0.5)), "position.factor": draw(often(1.0, 4.0)),
    "position.original_context": draw(often(8, 0, 64)),
    "position.attention_factor": draw(often(0.0, 1.2)),
    "position.buckets": draw(often(8, 4, 5)), "position.max_distance": draw(often(10, 5)),
    "embed.types": draw(often(0, 2)), "embed.scale": draw(often(1.0, 3.0)),
    "embed.logit_scale": draw(often(1.0, 0.5)), "embed.logit_softcap": draw(often(0.0, 5.0)),
  }
  for key in ("mlp_bias", "tie_embeddings", "scan", "attention.sinks", "norm.bias", "norm.final",
              "embed.norm", "embed.head_bias"):
    made[key] = draw(st.booleans())
  if made["kind"] == "vision" or draw(often(False, True)):
    made |= IMAGE | {key: draw(st.booleans()) for key in (
      "vision.class_token", "vision.patch_bias", "vision.input_norm"
    )}
  made |= routed
  return _mostly_legal(draw, made)


@st.composite
def experts(draw):
  """Keys of experts, in one of two draws."""
  count = draw(st.sampled_from((0, 4, 0, 6)))
  if not count:  # every other key is then refused
    return {f"moe.{key}": value for key, value in dataclasses.asdict(MoeConfig()).items()}
  return {
    "moe.experts": count, "moe.router": draw(st.sampled_from(CHOICES["moe.router"])),
    "moe.drop": draw(st.sampled_from(CHOICES["moe.drop"])), "moe.top_k": draw(often(2, 1, 3)),
    "moe.width": draw(st.integers(0, 9)), "moe.shared": draw(often(0, 1, 2)),
    "moe.first_k_dense": draw(often(0, 1)),
    "moe.renormalize": draw(st.booleans()), "moe.scale": draw(often(1.0, 2.5)),
    "moe.groups": draw(often(1, 2)), "moe.top_groups": draw(often(1, 2)),
    "moe.noisy": draw(st.booleans()), "moe.bias": draw(st.booleans()),
    "moe.capacity": draw(often(0.0, 0.6, 1.0)),
  }


def _mostly_legal(draw, made):
  """Takes back what a kind refuses, five times of six, so that most draws train."""
  if draw(st.integers(0, 5)) == 0:
    return made
  if made["norm.kind"] == "rms":
    made["norm.bias"] = False
  if made["norm.place"] in ("post", "output"):
    made["block"] = "sequential"
  if made["kind"] == "encoder_decoder":
    made |= {"block": "sequential", "attention.mask": "auto", "embed.types": 0}
  if made["kind"] in ("encoder", "encoder_decoder"):
    made["vision.image_size"] = 0
  if made["kind"] == "vision":
    made |= {key: value for key, value in {
      "position.kind": "learned", "attention.mask": "auto", "embed.types": 0, "embed.scale": 1.0,
      "embed.head_bias": False, "embed.logit_scale": 1.0, "embed.logit_softcap": 0.0,
    }.items()}
  if made["position.scaling"] in ("yarn", "llama3"):
    made["position.original_context"] = 16
  return made | _legal_experts(made)


def _legal_experts(made):
  """What of experts to take back."""
  none = dataclasses.asdict(MoeConfig())
  if made["kind"] in ("encoder_decoder", "vision") or not made["moe.experts"]:
    return {f"moe.{key}": value for key, value in none.items()}
  back = {"mlp_bias": False, "moe.first_k_dense": 0}
  back["moe.first_k_dense"] = min(made["moe.first_k_dense"], made["layers"] - 1)
  keys = ["drop"] * (not made["moe.capacity"])
  if made["moe.router"] in ("expert_choice", "hash"):
    keys = ["drop", "bias", "noisy", "groups", "top_groups", "renormalize"]
  back |= {f"moe.{key}": none[key] for key in keys}
  groups = (made | back)["moe.groups"]
  top_groups = back["moe.top_groups"] = min(made["moe.top_groups"], groups)
  usable = made["moe.experts"] // groups * top_groups
  back["moe.top_k"] = min(made["moe.top_k"], usable)
  if back["moe.top_k"] == 1 and made["moe.router"] in ("softmax", "sigmoid"):
    back["moe.renormalize"] = False
  return back


def make(values):
  """The config of such keys, or None with a `UserError` in one line."""
  try:
    return make_config(**values)
  except UserError as error:
    assert str(error) and "\n" not in str(error)
    return None


def keeping_gradients():
  """An optax step that only remembers what came in, so that one compiled step shows all."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params: (grads, grads)
  )


def trains(config, muon: bool):
  """Takes one step; the loss, every gradient and every new weight are finite, and most moved."""
  model, values = weights_of(config), inputs(config)
  kind = "muon" if muon else "adamw"
  rule = make_optimizer(OptimConfig(kind=kind, warmup=1), 10, model)
  optimizer = optax.chain(keeping_gradients(), rule)
  targets, weights = scored_places(config, values)
  batch = batch_of(values, targets_bt=jnp.asarray(targets), loss_mask_bt=jnp.asarray(weights))
  loss = LossConfig(
    z_loss=0.01, label_smoothing=0.1, chunk=5, sequence_balance=0.02, router_z=0.01
  )
  experiment = Config(model=config, loss=loss)

  step = jax.jit(lambda model, batch: first_step(model, batch, experiment, optimizer))
  after, metrics = step(model, batch)
  assert np.isfinite(metrics["loss"]) and 0 < metrics["grad_norm"] < 1e5
  for path, grad in tree.flatten(after.optimizer[0]).items():
    assert np.isfinite(grad).all(), path
  for path, leaf in after.trainable.items():
    assert np.isfinite(leaf).all(), path
  before = tree.flatten(model)
  moved = [bool(np.any(leaf != before[path])) for path, leaf in after.trainable.items()]
  assert sum(moved) > len(moved) / 2
  return combine(model, after.trainable)


def does_not_leak(model, config):
  """Changing a token of a row changes, bit for bit, nothing that cannot see it."""
  values = {name: array[:1] for name, array in inputs(config).items()}
  if config.kind == "vision" or config.vision.image_size:
    return
  run = jax.jit(lambda model, batch: model.logits(model.hidden(batch)[0]))
  through, before = reached(config, values), np.asarray(run(model, batch_of(values)))[0]
  for place in (0, 4, 7):
    changed = values["tokens"].copy()
    changed[0, place] = (changed[0, place] + 1) % 30
    after = np.asarray(run(model, batch_of({**values, "tokens": changed})))[0]
    same = ~through[:, place]
    assert np.array_equal(after[same], before[same]), place


def check(values, muon):
  config = make(values)
  if config is not None:
    does_not_leak(trains(config, muon), config)
  hypothesis.event("refused" if config is None else config.kind)


@settings(max_examples=2, **COMMON)
@given(keys(), st.sampled_from((False, False, False, True)))
def test_any_legal_config_trains_and_does_not_leak(values, muon):
  check(values, muon)


@pytest.mark.slow
@settings(max_examples=200, **COMMON)
@given(keys(), st.booleans(), st.just("slow"))  # another signature, so other draws
def test_many_legal_configs_train_and_do_not_leak(values, muon, _):
  check(values, muon)


@st.composite
def nonsense(draw):
  """Some keys with values of their type from all over."""
  from tests.models.test_coverage import fields

  known = {key: kind for key, kind, _ in fields()}
  made = {}
  for key in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=6, unique=True)):
    kind = known[key]
    if key in CHOICES and kind is str:
      made[key] = draw(st.sampled_from((*CHOICES[key], "nonsense", "")))
    elif kind is bool:
      made[key] = draw(st.booleans())
    elif kind is int:
      made[key] = draw(st.sampled_from((-3, -1, 0, 1, 2, 3, 4, 5, 8, 16, 64)))
    elif kind is float:
      made[key] = draw(st.sampled_from((-1.0, 0.0, 1e-3, 0.5, 1.0, 1.5, 4.0, 100.0)))
    else:
      made[key] = draw(st.sampled_from(((), ("full",), ("window",), ("sparse", "full"), ("x",))))
  return made


@settings(max_examples=300, **COMMON)
@given(nonsense(), st.sampled_from(CHOICES["kind"]))
def test_what_is_no_model_is_refused_in_words_and_all_else_can_be_built(values, kind):
  config = make({"kind": kind, **values})
  if config is None:
    return
  shapes = jax.tree.leaves(abstract(config))
  assert all(leaf.dtype == jnp.float32 for leaf in shapes)
  if config.position.kind == "rope":
    from llmjax.nn.position import rope_angles

    cos, sin = rope_angles(jnp.arange(9)[None], config.position, config.dims["h"])
    assert np.isfinite(cos).all() and np.isfinite(sin).all()


@pytest.mark.parametrize(
  ("values", "says"),
  [
    ({"kind": "vision", "vision.image_size": 4, "vision.patch": 2}, "position.kind to learned"),
    ({"kind": "vision", "position.kind": "learned"}, "needs model.vision.image_size"),
    ({"kind": "encoder_decoder", "embed.types": 2}, "no token types"),
    ({"kind": "encoder_decoder", "attention.mask": "causal"}, "leave model.attention.mask"),
    ({**IMAGE, "vision.width": 0}, "model.vision.width 0 is less than 1"),
    ({**IMAGE, "vision.heads": 3}, "vision.width 16 is not a multiple of model.vision.heads 3"),
    ({**IMAGE, "vision.image_token": -1}, "model.vision.image_token -1 is less than 0"),
    ({**IMAGE, "kind": "encoder"}, "takes no images"),
    ({"position.scaling": "ntk", "position.fraction": 0.25}, "more than 2 rotary channels"),
    ({"norm.place": "post", "block": "parallel"}, "needs model.norm.place pre or sandwich"),
    ({"heads": 5, "kv_heads": 2, "head_dim": 4}, "heads 5 is not a multiple of model.kv_heads 2"),
    ({"head_dim": -2}, "model.head_dim -2 is less than 0"),
    ({"dropout": 1.0}, r"model.dropout 1.0 is not in \[0, 1\)"),
    ({"kind": "encoder_decoder", "moe.experts": 4}, "encoder_decoder has no experts"),
    ({"moe.experts": 4, "moe.first_k_dense": 2}, "moe.first_k_dense 2 leaves none of 2 layers"),
    ({"moe.experts": 4, "mlp_bias": True}, "experts have no biases: leave model.mlp_bias"),
  ],
)
def test_a_config_that_would_be_half_ignored_is_a_user_error(values, says):
  with pytest.raises(UserError, match=says):
    make_config(**values)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_another_machine_is_a_user_error(kernel):
  config = make_config(**{"attention.kernel": kernel})
  given = batch_of(inputs(config))
  with pytest.raises(UserError, match=f"model.attention.kernel={kernel} runs on"):
    jax.eval_shape(lambda model: model.hidden(given)[0], abstract(config))


def test_the_draws_reach_every_kind():
  configs = [config for config in map(make, _first()) if config]
  assert {config.kind for config in configs} == set(CHOICES["kind"])
  routed = [config.moe for config in configs if config.moe.experts]
  assert len(routed) > 3 and len({moe.router for moe in routed}) > 1


def _first():
  """The first configs of a run, without training them."""
  seen = []

  @settings(max_examples=25, **COMMON)
  @given(keys())
  def collect(values):
    seen.append(values)

  collect()
  return seen
