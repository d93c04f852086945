"""What training does for experts beside the gradient: even load by biases, and figures to watch."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import tree
from llmjax.nn.router import Routing


def move_biases(model: nnx.Module, load_le, rate: float) -> nnx.Module:
  """Moves every router's bias up where load was below the mean, down where it was above.

  Args:
    model: weights after the optimizer's update.
    load_le: places wanted at each expert of each layer in this step.
    rate: size of a move.
  Returns:
    The model; itself where routers have no biases.
  Source: Wang et al. 2024, arXiv:2408.15664, alg. 1.
  """
  step_le = rate * jnp.sign(load_le.mean(-1, keepdims=True) - load_le)
  move = lambda path, leaf: leaf + step_le if path.endswith("moe/bias_e") else leaf  # noqa: E731
  return tree.map_with_path(move, model)


def routing_metrics(routing: Routing) -> dict[str, jax.Array]:
  """Makes a step's figures of routing.

  Args:
    routing: sums over the step's tokens, stacked over layers.
  Returns:
    `moe_load` [l, e]: load over its mean; by layer [l]: `moe_entropy` in nats; over all layers:
    `moe_max_load` (mean of each layer's largest), `moe_dead` (experts with no token),
    `moe_dropped` (share of places), `moe_balance` (1 where load is even).
  """
  places_l = jnp.maximum(routing.load_e.sum(-1), 1)
  load_le = routing.load_e / jnp.maximum(routing.load_e.mean(-1, keepdims=True), 1e-9)
  tokens_l = jnp.maximum(routing.tokens, 1)
  return {
    "moe_load": load_le,
    "moe_entropy": routing.entropy / tokens_l,
    "moe_max_load": load_le.max(-1).mean(),
    "moe_dead": jnp.sum(routing.load_e == 0),
    "moe_dropped": jnp.mean(routing.dropped / places_l),
    "moe_balance": jnp.mean(routing.balance / tokens_l),
  }
