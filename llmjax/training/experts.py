"""What training does for experts beside the gradient: even load by biases, and figures to watch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.nn.param import roles
from llmjax.nn.router import RouterStats

STARVED = 50  # steps in a row without a token after which an expert is named


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
  role = roles(model)
  move = lambda path, leaf: leaf + step_le if role[path] == "router_bias" else leaf  # noqa: E731
  return tree.map_with_path(move, model)


def routing_metrics(routing: RouterStats, model: nnx.Module) -> dict[str, jax.Array]:
  """Makes a step's figures of routing.

  Args:
    routing: sums over the step's tokens, stacked over layers.
    model: weights, for the routers' biases.
  Returns:
    `moe_load` [l, e]: load over its mean; `moe_bias` [l, e] where there is one; by layer [l]:
    `moe_entropy` in nats, `moe_dropped` (share of places); over all layers: `moe_max_load` (mean of
    each layer's largest), `moe_dead` (experts with no token), `moe_balance` (1 where load is even).
  """
  places_l = jnp.maximum(routing.load_e.sum(-1), 1)
  load_le = routing.load_e / jnp.maximum(routing.load_e.mean(-1, keepdims=True), 1e-9)
  tokens_l = jnp.maximum(routing.tokens, 1)
  role = roles(model)
  biases = [leaf for path, leaf in tree.flatten(model).items() if role[path] == "router_bias"]
  return dict(zip(("moe_bias",), biases, strict=False)) | {
    "moe_load": load_le,
    "moe_entropy": routing.entropy / tokens_l,
    "moe_dropped": routing.dropped / places_l,
    "moe_max_load": load_le.max(-1).mean(),
    "moe_dead": jnp.sum(routing.load_e == 0),
    "moe_balance": jnp.mean(routing.balance / tokens_l),
  }


class Starving:
  """Notices experts that go without a token for `STARVED` reported steps in a row."""

  def __init__(self):
    self._hungry = 0

  def add(self, load_le) -> list[str]:
    """Takes a step's load, layers of experts; returns lines about those that just starved."""
    empty_le = np.asarray(load_le) == 0
    self._hungry = np.where(empty_le, self._hungry + 1, 0)
    return [
      f"expert {expert} of layer {layer} has had no token for {STARVED} reported steps"
      for layer, expert in np.argwhere(self._hungry == STARVED)
    ]
