"""Trainable and frozen parameters: `TrainState` holds both by path."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core import tree
from llmjax.core.compat import same_bits_options
from llmjax.models.build import abstract, build
from llmjax.parallel.rules import ZERO, optimizer_shardings, weight_shardings
from llmjax.training.config import Config
from llmjax.training.optim import assign, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What one step takes and the next one gets.

  Attributes:
    step: int32 scalar, steps done.
    trainable: parameters that gradients are taken for, by path; fp32 master weights. Of
      schedule-free the averages, which are evaluated and kept; see `training.optimizers`.
    frozen: all other parameters, by path.
    optimizer: optax state of the trainable ones, its moments sharded as they are.
  """

  step: jax.Array
  trainable: dict[str, jax.Array]
  frozen: dict[str, jax.Array]
  optimizer: optax.OptState


def split(model, groups) -> tuple[dict, dict]:
  """Divides a model's parameters into (trainable, frozen), each path → array.

  Raises:
    UserError: `optim.groups` do not fit the model; see `training.optim.assign`.
  """
  options, leaves = assign(groups, model), tree.flatten(model)
  trainable = {path: leaf for path, leaf in leaves.items() if options[path] is not None}
  return trainable, {path: leaf for path, leaf in leaves.items() if path not in trainable}


def combine(model, trainable: dict, frozen: dict | None = None) -> nnx.Module:
  """Builds a model of parameters by path; the inverse of `split`.

  Args:
    model: the abstract tree, or a model, whose own leaves stand where neither dict has the path.
  """
  return tree.unflatten(model, tree.flatten(model) | trainable | (frozen or {}))


def model_of(state: TrainState, config: Config) -> nnx.Module:
  """Builds the model that a state holds the parameters of."""
  return combine(abstract(config.model), state.trainable, state.frozen)


def optimizer_of(config: Config) -> optax.GradientTransformation:
  """Builds the experiment's optimizer."""
  return make_optimizer(config.optim, config.train.steps, abstract(config.model))


def init_state(config: Config) -> TrainState:
  """Makes the state of step 0, a function of the experiment."""
  trainable, frozen = split(build(jax.random.key(config.seed), config.model), config.optim.groups)
  return TrainState(jnp.int32(0), trainable, frozen, optimizer_of(config).init(trainable))


def init_sharded(config: Config, mesh: Mesh) -> TrainState:
  """Makes the state of step 0 where it will live, no device holding more than its share.

  The bits are the same on every mesh of a platform.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
  options = same_bits_options(mesh.devices.flat[0].platform)
  return jax.jit(
    lambda: init_state(config), out_shardings=shardings, compiler_options=options
  )()


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Describes the state (shapes, dtypes, shardings) without making it.

  With `train.zero_stage` 3 `fsdp` shards parameters and optimizer state, with 1 and 2 the
  optimizer state alone.
  """
  shapes = jax.eval_shape(lambda: init_state(config))
  table = ZERO[config.train.zero_stage]
  shardings = TrainState(
    step=NamedSharding(mesh, PartitionSpec()),
    trainable=weight_shardings(mesh, shapes.trainable, table),
    frozen=weight_shardings(mesh, shapes.frozen, table),
    optimizer=optimizer_shardings(mesh, shapes.optimizer, shapes.trainable),
  )
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes,
    shardings,
  )
