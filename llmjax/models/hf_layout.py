"""How another project lays a tensor out, as an expression of letters, and moving it both ways.

A table has one row a tensor: their name → (letters of their layout, our path or paths).

- `d(nh)`: two dimensions, the second holding heads × head width in one; `{l}` in a name counts the
  layers, which stand in one array here.
- `d(nh+kh+kh)`: several of our arrays one after another, and as many paths.
- `(n*h)d`: several of our arrays stacked where the star stands.
- a number is so many entries that are not kept (written as zeros): `(2+t)d`; a `1` by itself is an
  empty dimension: `11d`.
- `I`: our i, kept as channels, rows and columns of a patch.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.hf_family import note


def from_tensors(
  config: ModelConfig, tensors: Mapping, table: dict, offset: float = 0.0, optional: tuple = ()
) -> nnx.Module:
  """Builds a model from tensors under another project's names.

  Args:
    config: the architecture.
    tensors: numpy arrays by their name; each is asked for once.
    table: their name → (their letters, our path or paths). Rows whose paths the architecture lacks
      are passed over.
    offset: added to the scales of norms.
    optional: patterns (regular expressions) of our paths that may be missing: a square matrix then
      becomes the identity, a scale 1, everything else 0, and a note on stderr says so.
  Returns:
    The module, fp32.
  Raises:
    UserError: a tensor is missing, is of another shape, or is left over.
  """
  like = abstract(config)
  shapes = {path: leaf.shape for path, leaf in tree.flatten(like).items()}
  made, blank, left = {}, [], set(tensors)
  for name, letters, paths in _rows(table, shapes):
    stacked = "{l}" in name
    names = [name.format(l=i) for i in range(shapes[paths[0]][0])] if stacked else [name]
    missing = [each for each in names if each not in left]
    if missing and all(_matches(path, optional) for path in paths):
      made |= {path: _blank(path, shapes[path]) for path in paths}
      blank += paths
      continue
    if missing:
      raise UserError(f"tensor {missing[0]!r} (for {', '.join(paths)}) is missing")
    targets = [(path, shapes[path][1:] if stacked else shapes[path]) for path in paths]
    layers = [unpack(tensors[each], letters, targets, config, each) for each in names]
    left -= set(names)
    for path, *arrays in zip(paths, *layers, strict=True):
      made[path] = np.stack(arrays) if stacked else arrays[0]
      if offset and is_scale(path):
        made[path] = made[path] + np.float32(offset)
  if left:
    shown = ", ".join(sorted(left)[:4])
    raise UserError(f"{len(left)} tensors have no place in the model: {shown}")
  if blank:
    note(f"no tensors for {', '.join(blank)}: identity matrices, scales of 1 and zeros stand in")
  for path in shapes:
    if path not in made:
      raise UserError(f"no tensor of this layout holds the model's {path!r}")
  return jax.tree.map(jnp.asarray, tree.unflatten(like, made))


def to_tensors(
  config: ModelConfig, parameters: nnx.Module | dict, table: dict, offset: float = 0.0
) -> dict[str, np.ndarray]:
  """Lays a model out under another project's names: the inverse of `from_tensors`.

  Args:
    config: the architecture.
    parameters: the module, or its leaves by path.
    table: their name → (their letters, our path or paths).
    offset: subtracted from the scales of norms.
  Returns:
    fp32 arrays by their name.
  Raises:
    UserError: a weight that no row of the table holds.
  """
  leaves = parameters if isinstance(parameters, dict) else tree.flatten(parameters)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  tensors, left = {}, set(leaves)
  for name, letters, paths in _rows(table, shapes):
    arrays = [np.asarray(leaves[path], np.float32) for path in paths]
    if offset:
      pairs = zip(paths, arrays, strict=True)
      arrays = [array - np.float32(offset) if is_scale(path) else array for path, array in pairs]
    left -= set(paths)
    if "{l}" not in name:
      tensors[name] = pack(arrays, letters, paths, config)
      continue
    for i in range(len(arrays[0])):
      tensors[name.format(l=i)] = pack([array[i] for array in arrays], letters, paths, config)
  if left:
    raise UserError(f"this layout has no tensor for {sorted(left)[0]!r} ({len(left)} weights)")
  return tensors


def _rows(table, shapes):
  """The rows that this architecture has, as (name, letters, paths)."""
  for name, (letters, paths) in table.items():
    paths = (paths,) if isinstance(paths, str) else paths
    if paths[0] in shapes:
      yield name, letters, paths


def _matches(path, patterns) -> bool:
  return any(re.search(pattern, path) for pattern in patterns)


def _blank(path, shape):
  if is_scale(path):
    return np.ones(shape, np.float32)
  if path.endswith("_id") and shape[0] == shape[1]:
    return np.eye(shape[0], dtype=np.float32)
  return np.zeros(shape, np.float32)


def is_scale(path: str) -> bool:
  """Whether a path is the scale of a norm."""
  return path.rsplit("/", 1)[-1].startswith("scale_")


def unpack(array, letters: str, targets, config: ModelConfig, name: str) -> list[np.ndarray]:
  """Takes one of their tensors apart.

  Args:
    array: their tensor, any float dtype.
    letters: its expression.
    targets: (path, shape) of each of our arrays in it.
    config: the architecture, for the sides of a patch.
    name: for messages.
  Returns:
    fp32 arrays in our layout.
  """
  layout = _Layout(letters, targets, config)
  if array.shape != layout.shape:
    raise UserError(
      f"tensor {name!r} has shape {array.shape}, which is not {letters} = {layout.shape}"
    )
  array = np.asarray(array, np.float32).reshape(layout.joined)
  if layout.star is not None:
    array = array.reshape(layout.starred)
    fine = [np.take(array, i, axis=layout.star) for i in range(len(targets))]
  else:
    cuts = np.cumsum([size for size, _ in layout.parts])[:-1]
    pieces = np.split(array, cuts, axis=layout.axis)
    fine = [piece for piece, (_, kept) in zip(pieces, layout.parts, strict=True) if kept]
  return [
    np.ascontiguousarray(piece.reshape(shape).transpose(order))
    for piece, shape, order in zip(fine, layout.fine, layout.orders, strict=True)
  ]


def pack(arrays, letters: str, paths, config: ModelConfig) -> np.ndarray:
  """Puts one of their tensors together: the inverse of `unpack`."""
  targets = [(path, array.shape) for path, array in zip(paths, arrays, strict=True)]
  layout = _Layout(letters, targets, config)
  fine = [
    array.transpose(np.argsort(order)) for array, order in zip(arrays, layout.orders, strict=True)
  ]
  if layout.star is not None:
    return np.stack(fine, axis=layout.star).reshape(layout.shape)
  pieces, made = iter(fine), []
  for size, kept in layout.parts:
    shape = [size if i == layout.axis else n for i, n in enumerate(layout.joined)]
    made.append(next(pieces).reshape(shape) if kept else np.zeros(shape, np.float32))
  return np.concatenate(made, axis=layout.axis).reshape(layout.shape)


class _Layout:
  """An expression with its sizes.

  Attributes:
    shape: their tensor's; joined: with the three dimensions of `I` as one.
    axis: the dimension of `joined` that may hold several parts; parts: (size, kept) of each.
    star: where in `starred`, `joined` with every letter by itself, our arrays are stacked.
    fine: shape of each of our arrays in their order of letters; orders: from that to ours.
  """

  def __init__(self, letters, targets, config):
    found = re.findall(r"\(([^)]*)\)|(.)", letters.replace("I", "i"))
    groups = [(inner or single).split("+") for inner, single in found]
    several = [i for i, parts in enumerate(groups) if len(parts) > 1 or "*" in parts[0]]
    self.axis = several[0] if several else 0
    held = groups[self.axis]
    choices = [part for part in held if not part.isdigit()] if several else held
    choices *= len(targets) if "*" in letters else 1
    self.star, self.fine, self.orders, sizes_of = None, [], [], []
    for (path, shape), choice in zip(targets, choices, strict=True):
      chosen = [choice if i == self.axis else parts[0] for i, parts in enumerate(groups)]
      sizes, ours = _sizes(path, shape, "".join(chosen))
      plain = re.sub(r"[\d*]", "", "".join(chosen))
      self.fine.append([sizes[letter] for letter in plain])
      self.orders.append([plain.index(letter) for letter in ours])
      sizes_of.append([_size(part, sizes) for part in chosen])
      if "*" in choice:
        self.star = re.sub(r"\d", "", "".join(chosen)).index("*")
    ends = iter(sizes[self.axis] for sizes in sizes_of)
    self.parts = [
      (int(part), False) if several and part.isdigit() else (next(ends), True) for part in held
    ]
    self.joined = list(sizes_of[0])
    self.joined[self.axis] = sum(size for size, _ in self.parts)
    if self.star is not None:
      self.joined[self.axis] *= len(targets)
      self.starred = [*self.fine[0][: self.star], len(targets), *self.fine[0][self.star :]]
    self.shape = tuple(self.joined)
    if "I" in letters:
      at, vision = letters.index("I"), config.vision
      sides = (vision.channels, vision.patch, vision.patch)
      self.shape = (*self.shape[:at], *sides, *self.shape[at + 1 :])


def _sizes(path, shape, spelled):
  """(size of each letter, our letters as their expression spells them)."""
  ours = path.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
  if "k" in ours and "k" not in spelled:  # a layout with as many of both
    ours = ours.replace("k", "n")
  return dict(zip(ours, shape, strict=True)), ours


def _size(part, sizes):
  return int(part) if part.isdigit() else math.prod(sizes[x] for x in part if x != "*")
