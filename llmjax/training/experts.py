"""What training does for experts beside the gradient: biases for even load, and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.nn.param import roles
from llmjax.nn.router import RouterStats

STARVED = 50  # steps in a row without a token after which an expert is named


def router_biases(model: nnx.Module) -> list[str]:
  """Lists the paths of the biases that a model's routers choose experts by."""
  return [path for path, role in roles(model).items() if role == "router_bias"]


def move_biases(trainable: dict, biases: list[str], load_le, rate: float) -> dict:
  """Moves the routers' biases up where load was below the mean, down where it was above.

  Args:
    trainable: parameters by path after the optimizer's update.
    biases: paths of the biases, of which frozen ones are not moved.
    load_le: assignments to each expert of each layer in this step.
  Returns:
    The parameters by path.
  Source: Wang et al. 2024, arXiv:2408.15664, alg. 1.
  """
  step_le = rate * jnp.sign(load_le.mean(-1, keepdims=True) - load_le)
  return trainable | {path: trainable[path] + step_le for path in biases if path in trainable}


def routing_metrics(routing: RouterStats, biases: list) -> dict[str, jax.Array]:
  """Makes a step's metrics of routing.

  Args:
    biases: the routers' biases, [l, e] each; empty where there are none.
  Returns:
    `moe_load` [l, e]: load over its mean; `moe_bias` [l, e] where there is one; by layer [l]:
    `moe_entropy` in nats, `moe_dropped` (share of assignments); over all layers: `moe_max_load`
    (mean of each layer's largest), `moe_dead` (experts with no token), `moe_balance` (1 where load
    is even).
  """
  assigned_l = jnp.maximum(routing.load_e.sum(-1), 1)
  load_le = routing.load_e / jnp.maximum(routing.load_e.mean(-1, keepdims=True), 1e-9)
  tokens_l = jnp.maximum(routing.tokens, 1)
  return dict(zip(("moe_bias",), biases, strict=False)) | {
    "moe_load": load_le,
    "moe_entropy": routing.entropy / tokens_l,
    "moe_dropped": routing.dropped / assigned_l,
    "moe_max_load": load_le.max(-1).mean(),
    "moe_dead": jnp.sum(routing.load_e == 0),
    "moe_balance": jnp.mean(routing.balance / tokens_l),
  }


class Starving:
  """Notices experts that go without a token for `STARVED` reported steps in a row."""

  def __init__(self):
    self._steps_le = 0

  def add(self, load_le) -> list[str]:
    """Takes a step's load; returns a line about each expert that has just starved so long."""
    self._steps_le = np.where(np.asarray(load_le) == 0, self._steps_le + 1, 0)
    return [
      f"expert {expert} of layer {layer} has had no token for {STARVED} reported steps"
      for layer, expert in np.argwhere(self._steps_le == STARVED)
    ]
