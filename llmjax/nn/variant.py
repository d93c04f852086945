"""Variants of a layer, chosen by the config: attention's and the feed-forward layer's."""

import dataclasses

from flax import nnx

from llmjax.core.errors import UserError


class Variant:
  """A variant of a layer; what is not overridden is that of the default variant.

  A variant is a file: its config section (a frozen dataclass derived from this class, which becomes
  a field of the config above it), and the module that its method `layer` makes.
  """

  @property
  def used(self) -> bool:
    """Whether the section's values select this variant."""
    return True

  def check(self, model):
    """Raises a `UserError` where the variant does not fit the rest of a `ModelConfig`."""


def chosen(config, kind: type[Variant], default: Variant) -> Variant:
  """Finds the one section of a config, of type `kind`, that is used; `default` if none is.

  Raises:
    UserError: two sections are in use.
  """
  sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  used = [name for name, each in sections.items() if isinstance(each, kind) and each.used]
  if len(used) > 1:
    raise UserError(f"config sections {' and '.join(used)} exclude each other: use one of them")
  return sections[used[0]] if used else default


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
      tokens_bt: int32 ids, for routers that read them.
      real_bt: bool, False for padding; None: all are real.
      key: PRNG key of noisy routers; None draws nothing.
    """
    return layer(x_btd), None
