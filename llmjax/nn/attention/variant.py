"""The interface of a variant of attention, and the inputs that all its layers share."""

import dataclasses

import jax
from flax import nnx

from llmjax.core.errors import UserError
from llmjax.nn.attention.mask import Mask
from llmjax.nn.attention.scores import Bias
from llmjax.nn.norm import NormConfig
from llmjax.nn.variant import Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
  """Inputs of attention that are the same for all layers of one kind.

  Attributes:
    mask: which keys each query attends to; its keys are the cache's slots where there is a cache.
    rope: (cos, sin) of the positions, or None.
    bias: position bias added to the scores, or None.
  """

  mask: Mask
  rope: tuple | None = None
  bias: Bias | None = None


class AttentionVariant(Variant):
  """A variant of attention; the default is grouped-query attention."""

  def layer(
    self, key, dims: dict[str, int], config, norm: NormConfig, layout: str, out_scale: float
  ) -> nnx.Module:
    """Makes a layer: a module called as (x_btd, inputs, positions_bt, cache) → (y_btd, cache),
    with a method `weights(x_btd, inputs)` → [b, n, t, s] for those who look into a model.

    Args:
      layout: pairing of the channels that rope rotates.
      out_scale: factor on the output projection's initial standard deviation.
    """
    raise NotImplementedError

  def cache_shapes(self, dims: dict[str, int], batch: int, slots: int) -> tuple:
    """Shapes of a layer's cache: (that of keys [b, k, s, h], that of values or None)."""
    return ((batch, dims["k"], slots, dims["h"]),) * 2

  def head_dim(self, model) -> int:
    """Width of a head's queries and keys (h) in a `ModelConfig`."""
    return model.head_dim or model.width // model.heads

  def rotary_dim(self, model) -> int:
    """Channels of a head that `model.position.fraction` is a fraction of."""
    return self.head_dim(model)

  def check(self, model):
    if not model.head_dim and model.width % model.heads:
      raise UserError(
        f"model.width {model.width} is not a multiple of model.heads {model.heads}; set head_dim"
      )

  def shrunk(self, devices: int, head_dim: int) -> "AttentionVariant":
    """The section of a tiny model with heads of `head_dim` that up to `devices` divide likewise."""
    return self
