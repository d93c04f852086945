"""`TrainState`: all that a step changes, made already sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core.compat import same_bits_options
from llmjax.models.build import abstract, build
from llmjax.parallel.rules import REPLICATED, WEIGHTS, optimizer_shardings, weight_shardings
from llmjax.training.config import Config
from llmjax.training.optim import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What one step takes and the next one gets.

  Attributes:
    step: int32 scalar, steps done.
    model: fp32 master weights.
    optimizer: optax state, its moments laid out as the weights are.
  """

  step: jax.Array
  model: nnx.Module
  optimizer: optax.OptState


def optimizer_of(config: Config) -> optax.GradientTransformation:
  """The experiment's optimizer."""
  return make_optimizer(config.optim, config.train.steps, abstract(config.model))


def init_state(config: Config) -> TrainState:
  """Makes the state of step 0, a function of the experiment."""
  model = build(jax.random.key(config.seed), config.model)
  return TrainState(jnp.zeros((), jnp.int32), model, optimizer_of(config).init(model))


def init_sharded(config: Config, mesh: Mesh) -> TrainState:
  """Makes the state of step 0 where it will live: the same bits on every mesh of a platform.

  No device ever holds more than its part.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
  options = same_bits_options(mesh.devices.flat[0].platform)
  make = functools.partial(init_state, config)
  return jax.jit(make, out_shardings=shardings, compiler_options=options)()


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Describes the state (shapes, dtypes, shardings) without making it.

  With `train.zero_stage` 3 `fsdp` cuts weights and optimizer state, with 1 and 2 the state alone.
  """
  shapes = jax.eval_shape(lambda: init_state(config))
  table = WEIGHTS if config.train.zero_stage == 3 else REPLICATED
  shardings = TrainState(
    step=NamedSharding(mesh, PartitionSpec()),
    model=weight_shardings(mesh, shapes.model, table),
    optimizer=optimizer_shardings(mesh, shapes.optimizer, shapes.model),
  )
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )
