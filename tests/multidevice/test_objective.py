"""Token log-probabilities and frozen parameters: every mesh gives what one device gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.data.batch import Batch
from llmjax.data.prepare import TokenStore
from llmjax.eval import loss
from llmjax.eval.loss import evaluate_loss
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import WEIGHTS, batch_sharding, shard_weights, weight_shardings
from llmjax.training.check import GRADIENT_LIMIT, _quick, compare, on_mesh, on_one_device
from llmjax.training.objective import token_logprobs
from llmjax.training.shrink import made_up_batch
from llmjax.training.step import compiler_options
from tests.models.variants import make_config, weights_of
from tests.multidevice.test_step import experiment

SHAPE = re.compile(r"f32\[([\d,]+)\]")


def test_logprobs_and_gradients_on_fsdp_tensor_and_context_equal_one_devices():
  config = make_config(
    width=16, heads=4, kv_heads=2, mlp_width=32, vocab_size=96, max_seq_len=16, layers=2
  )
  model, rng = weights_of(config), np.random.default_rng(0)
  shape = (4, 16)
  draw = lambda: jnp.asarray(rng.integers(0, 96, shape), jnp.int32)  # noqa: E731
  batch = Batch(tokens_bt=draw(), targets_bt=draw())
  weights_bt = jnp.asarray(rng.normal(size=shape), jnp.float32)

  def plain(model):
    logits = model.logits(model.hidden(batch)[0])
    all_btv = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(all_btv, batch.targets_bt[..., None], -1)[..., 0]

  def chunked(model, batch):
    return token_logprobs(shard_weights(model, WEIGHTS), batch, chunk=4)

  def both(function, model):
    total = lambda model: jnp.sum(weights_bt * jnp.sin(function(model)))  # noqa: E731
    return function(model), tree.flatten(jax.grad(total)(model))

  expected, grads = jax.jit(functools.partial(both, plain), compiler_options=_quick())(model)
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
  with jax.set_mesh(mesh):
    placed = jax.device_put(batch, batch_sharding(mesh))
    sharded = jax.device_put(model, weight_shardings(mesh, model))
    run = jax.jit(
      lambda model, batch: both(lambda model: chunked(model, batch), model),
      compiler_options=_quick() | compiler_options(mesh),
    )
    compiled = run.lower(sharded, placed).compile()
    found, many = compiled(sharded, placed)
  assert_allclose(found, expected, rtol=2e-6, atol=5e-6)  # as in tests/training/test_objective.py
  for path, grad in grads.items():
    assert np.linalg.norm(many[path] - grad) < GRADIENT_LIMIT * np.linalg.norm(grad), path
  # Of a device's 2 rows × 8 positions × 48 tokens logits exist for 4 positions at a time.
  shapes = {tuple(map(int, found.split(","))) for found in SHAPE.findall(compiled.as_text())}
  assert (2, 4, 48) in shapes
  assert not [s for s in shapes if s[-1] in (48, 96) and len(s) > 2 and np.prod(s[:-1]) > 2 * 4]


FROZEN = "optim.groups=(('*/mlp/*',None),('embed/*',None),('*/scale_d',{'rate':0.5}),('*',{}))"


@pytest.mark.parametrize(
  "sizes",
  [
    {"stage": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 4, "context": 2}, marks=pytest.mark.slow),
  ],
  ids=["pipeline", "fsdp"],
)
def test_frozen_parameters_in_a_pipeline_and_under_fsdp(sizes):
  config = experiment(FROZEN, "model.layers=2", "train.grad_accum_steps=2")
  batch = made_up_batch(config)
  want = on_one_device(config, batch)
  assert not any("/mlp/" in path or "embed" in path for path in want.grads)
  row = compare(on_mesh(config, make_mesh(MeshConfig(data=1, **sizes)), batch), want)
  assert row["ok"], row


@pytest.mark.slow
def test_scores_of_rows_of_several_widths_are_those_of_one_device(monkeypatch):
  config = make_config(
    width=16, heads=4, kv_heads=2, mlp_width=32, vocab_size=96, max_seq_len=32, layers=2
  )
  model, rng = weights_of(config), np.random.default_rng(0)
  lengths = np.asarray([70, 9, 33, 5, 8, 17, 6, 4, 40])
  records = [rng.integers(0, 96, length).astype("<u4").tobytes() for length in lengths]
  store = TokenStore("key", lengths, 1000, records)
  expected = evaluate_loss(model, store, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  monkeypatch.setattr(loss, "_UNIT", 4)
  mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
  sharded = jax.device_put(model, weight_shardings(mesh, model))
  found = evaluate_loss(sharded, store, mesh, batch_size=4)
  assert found["tokens"] == expected["tokens"] == sum(lengths) - len(lengths)
  # fp32 sums of some hundred terms in another order.
  assert_allclose(found["nats_per_token"], expected["nats_per_token"], rtol=1e-6)
