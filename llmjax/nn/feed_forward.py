"""The interface of a kind of feed-forward layer."""

from flax import nnx

from llmjax.nn.variant import Variant


class FeedForward(Variant):
  """A kind of feed-forward layer.

  Attributes:
    name: of the layer within its block, in paths of parameters.
    first_k_dense: first layers of a stack that have the dense layer instead.
  """

  name = "mlp"
  first_k_dense = 0

  def layer(self, key, model, out_scale: float) -> nnx.Module:
    """Makes a layer for a `ModelConfig`; `out_scale` is of the output projection's initial std."""
    raise NotImplementedError

  def run(self, layer: nnx.Module, x_btd, tokens_bt=None, real_bt=None, key=None) -> tuple:
    """Runs a layer: (y_btd, the router's `RouterStats` or None).

    Args:
      layer: the module that `layer` returned.
      x_btd: normed residual stream.
      tokens_bt: int32 ids, for routers that read them.
      real_bt: bool, False for padding; None: all are real.
      key: PRNG key of noisy routers; None draws nothing.
    """
    return layer(x_btd), None
