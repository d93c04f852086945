"""Every optimizer's state is sharded as its weights are, factored moments too, and steps alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from llmjax.core import tree
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import optimizer_shardings, weight_shardings
from llmjax.training.optim import OptimConfig, make_optimizer
from llmjax.training.optimizers import KINDS

# Adafactor factors what has two dimensions of 128 or more.
SHAPES = {
  "blocks/mlp/up_df": ((2, 128, 256), "matrix"),
  "blocks/attention/out_nhd": ((2, 4, 32, 128), "matrix"),
  "blocks/moe/down_efd": ((2, 2, 256, 128), "matrix"),
  "blocks/norm/scale_d": ((2, 128), "scale"),
  "embed/token_vd": ((384, 128), "table"),
}
FACTORED = {  # (rows' and columns' shards of 256 or 384 × 128 on fsdp 2 × tensor 2)
  "blocks/mlp/up_df": ((2, 64), (2, 128)),
  "blocks/moe/down_efd": ((2, 2, 64), (2, 2, 128)),
  "embed/token_vd": ((64,), (192,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_mesh_equals_one_devices(kind):
  rng = np.random.default_rng(0)
  noise = lambda: {  # noqa: E731
    path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (shape, _) in SHAPES.items()
  }
  weights, gradients = noise(), [noise(), noise()]
  roles = {path: role for path, (_, role) in SHAPES.items()}
  config = OptimConfig(
    kind=kind, warmup=1, schedule="constant", clip_norm=1.0,
    learning_rate=1.0 if kind == "sgd" else 1e-3,  # whose updates are as small as gradients
  )
  optimizer = make_optimizer(config, 4, weights, roles)

  @jax.jit
  def step(weights, state, grads):
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state

  one, state = weights, optimizer.init(weights)
  for grads in gradients:
    one, state = step(one, state, grads)

  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  of_state = optimizer_shardings(mesh, jax.eval_shape(optimizer.init, weights), weights)
  shards = {}
  for path, leaf in tree.flatten(state).items():
    sharding = tree.flatten(of_state)[path]
    assert len(sharding.spec) <= leaf.ndim, path
    shards[path] = sharding.shard_shape(leaf.shape)
    if leaf.size > 2000:
      assert np.prod(shards[path]) * 2 <= leaf.size, f"{path} is replicated"
  if kind == "adafactor":
    for path, (row, column) in FACTORED.items():
      found = {shape for name, shape in shards.items() if name.endswith(path)}
      assert found == {row, column, (1,)}, path

  with jax.set_mesh(mesh):
    of_weights = weight_shardings(mesh, weights)
    many = jax.device_put(weights, of_weights)
    kept = jax.device_put(optimizer.init(weights), of_state)
    for grads in gradients:
      many, kept = step(many, kept, jax.device_put(grads, of_weights))
  # Means over at most 2^16 numbers in another order: a few roundings of 2^-24; Newton-Schulz
  # multiplies a rounding by up to 3.4 five times, as in tests/training/test_optim.py.
  atol = 1e-4 if kind == "muon" else 2e-6
  for path, leaf in one.items():
    assert_allclose(many[path], leaf, rtol=0, atol=atol, err_msg=path)
    assert np.abs(leaf - weights[path]).max() > 10 * atol
