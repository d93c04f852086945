"""Variants of a layer, chosen by the config: attention's and the feed-forward layer's."""

import dataclasses

from llmjax.core.errors import UserError


def chosen(config, kind: type, default):
  """Finds the section of a config that selects a variant.

  Args:
    config: a dataclass; its fields that are a `kind` are the variants to choose from.
    kind: base class of the variants' sections.
    default: the variant where no section is in use.
  Returns:
    The section whose `used` is true, or `default`.
  Raises:
    UserError: two sections are in use.
  """
  sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  used = [name for name, each in sections.items() if isinstance(each, kind) and each.used]
  if len(used) > 1:
    raise UserError(f"config sections {' and '.join(used)} exclude each other: use one of them")
  return sections[used[0]] if used else default
