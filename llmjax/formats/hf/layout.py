"""Tensors of another project ↔ our weights, by one table for each family.

A row is a module, whose first dimension is its output: their name → ours. `{q,k}_proj` →
`{query,key}` is two rows in one, if ours has both; `qk_proj` → `{query,key}` one tensor that holds
two of our weights. The first row that names a module has it. Any other tensor has a row of its own:
its name → (letters of its layout, our path or paths). `{l}` in a name counts the layers and `{e}`
the experts, which are stacked here; rows name `blocks` and hold for the dense layers `first` too.

- `d(nh)`: two dimensions, the second being heads × head width.
- `d(nh+kh+kh)`: several of our arrays concatenated, and as many paths.
- `(n*h)d`: for each n what follows the star of every array.
- a number is so many entries that are not kept (written as zeros): `(2+t)d`; a `1` by itself is an
  empty dimension: `11d`.
- `I`: our i, kept as channels, rows and columns of a patch.
"""

import math
import re
from collections import UserDict
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.core.errors import UserError, note
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.nn.param import roles


class Tensors(UserDict):
  """Tensors by name, each read by a function when it is asked for."""

  def __getitem__(self, name: str) -> np.ndarray:
    return self.data[name]()


def from_tensors(
  config: ModelConfig, tensors: Mapping, table: dict, offset: float = 0.0, optional: tuple = ()
) -> nnx.Module:
  """Builds a model from tensors under another project's names.

  Args:
    tensors: arrays of any float dtype by their name; each is asked for once.
    table: rows as above; those whose paths the architecture lacks are passed over.
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
  weights, left = {}, set(tensors)
  for names, paths, layout in _rows(config, table, shapes):
    missing = [name for name in names if name not in left]
    if missing and all(matches(path, optional) for path in paths):
      continue
    if missing:
      raise UserError(f"tensor {missing[0]!r} (for {', '.join(paths)}) is missing")
    left -= names.keys()
    for path in paths:
      weights.setdefault(path, np.empty(shapes[path], np.float32))
    for name, index in names.items():
      array = tensors[name]
      if array.shape != layout.shape:
        raise UserError(
          f"tensor {name!r} has shape {array.shape}, which is not {layout.letters} = {layout.shape}"
        )
      for number, path in enumerate(paths):
        weights[path][index] = layout.view(array, number)
  if left:
    shown = ", ".join(sorted(left)[:4])
    raise UserError(f"{len(left)} tensors have no place in the model: {shown}")
  ones = scales(config)
  weights |= {path: weights[path] + np.float32(offset) for path in weights.keys() & ones}
  absent = {path: shape for path, shape in shapes.items() if path not in weights}
  weights |= _neutral(absent, optional, ones)
  return jax.tree.map(jnp.asarray, tree.unflatten(like, weights))


def _neutral(shapes: dict, optional: tuple, ones: set) -> dict[str, np.ndarray]:
  """Values that change nothing, for the weights that no tensor holds, if they may be missing."""
  weights = {}
  for path, shape in shapes.items():
    if not matches(path, optional):
      raise UserError(f"no tensor of this layout holds the model's {path!r}")
    square = path.endswith("_id") and shape[0] == shape[1]
    array = np.eye(shape[0]) if square else np.full(shape, float(path in ones))
    weights[path] = array.astype(np.float32)
  if weights:
    note(f"no tensors for {', '.join(weights)}: identity matrices, scales of 1 and zeros stand in")
  return weights


def to_tensors(
  config: ModelConfig, leaves: Mapping, table: dict, offset: float = 0.0
) -> dict[str, np.ndarray]:
  """Turns weights by path into fp32 tensors under another project's names, `from_tensors`' inverse.

  Raises:
    UserError: a weight that no row of the table holds.
  """
  tensors, left, ones = {}, set(leaves), scales(config)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  for names, paths, layout in _rows(config, table, shapes):
    arrays = [np.asarray(leaves[path], np.float32) for path in paths]
    if paths[0] in ones:
      arrays = [array - np.float32(offset) for array in arrays]
    left -= set(paths)
    for name, index in names.items():
      tensors[name] = np.zeros(layout.shape, np.float32)
      for number, array in enumerate(arrays):
        layout.view(tensors[name], number)[...] = array[index]
  if left:
    raise UserError(f"this layout has no tensor for {sorted(left)[0]!r} ({len(left)} weights)")
  return tensors


def _rows(config: ModelConfig, table: dict, shapes: dict):
  """The rows that this architecture has: ({name of a tensor: its index in ours}, paths, layout)."""
  groups = {name: start for name, start, *_ in config.groups(config.layers)}
  group_of = lambda path: next((part for part in path.split("/") if part in groups), "blocks")  # noqa: E731
  for group, first in groups.items():
    paths = [path for path in shapes if group_of(path) == group]
    known = {path.replace(f"/{group}/", "/blocks/"): path for path in paths}
    for name, letters, row_paths in _resolve(table, known):
      paths = [known[path] for path in row_paths]
      counters = [letter for letter in "le" if f"{{{letter}}}" in name]
      names = {}
      for index in np.ndindex(shapes[paths[0]][: len(counters)]):
        layer, expert = (*index, 0, 0)[:2]
        names[name.format(l=first + layer, e=expert)] = index
      unstacked = [shapes[path][len(counters) :] for path in paths]
      yield names, paths, _Layout(letters, paths, unstacked, config)


def _resolve(table: dict, paths):
  """The rows that hold some of these paths: (name, letters, paths)."""
  modules = {}  # (module, bias or weight) → (letters, path)
  for path in paths:
    module, bias, letters = re.fullmatch(r"(.+?)(?:/scale|[/_](bias))?_([a-z]+)", path).groups()
    modules[module, bias or "weight"] = letters, path
  for name, row in table.items():
    if not isinstance(row, str):
      letters, held = row
      held = (held,) if isinstance(held, str) else held
      if held[0] in paths:
        yield name, letters, held
      continue
    names, held = _expand(name), _expand(row)
    if len(names) == 1:  # a tensor that holds several modules
      held = [held]
    elif all((module, "weight") in modules for module in held):
      held = [[module] for module in held]
    else:
      continue
    for one, several in zip(names, held, strict=True):
      for kind in ("weight", "bias"):
        found = [modules.pop((each, kind)) for each in several if (each, kind) in modules]
        if found:
          letters, held_paths = zip(*found, strict=True)
          yield f"{one}.{kind}", _concatenated(letters, "{e}" in one), held_paths


def _expand(name: str) -> list[str]:
  """`{a,b}_c` → `a_c`, `b_c`; braces without a comma stay."""
  before, words, after = re.fullmatch(r"(.*?)(?:\{(\w+,[\w,]+)\}(.*))?", name).groups()
  return [before + word + after for word in words.split(",")] if words else [name]


def _concatenated(letters, stacked: bool) -> str:
  """The layout of modules' weights in one tensor, outputs first, from the letters of ours."""
  letters = [each.removeprefix("e") if stacked else each for each in letters]
  sides = [re.findall("[nk]h|.", each)[::-1] for each in letters]  # a head's channels are together
  dimensions = ["+".join(side[0] for side in sides), *sides[0][1:]]
  return "".join(each if len(each) == 1 else f"({each})" for each in dimensions)


def matches(name: str, patterns) -> bool:
  """Whether one of these regular expressions is found in a name."""
  return any(re.search(pattern, name) for pattern in patterns)


def scales(config: ModelConfig) -> set[str]:
  """Paths of all norms' scales."""
  return {path for path, role in roles(abstract(config)).items() if role == "scale"}


class _Layout:
  """A layout expression with its sizes: `shape` is the tensor's. `arrays` are the letters of each
  of our arrays, `sizes` those letters' sizes; `groups` are, for each dimension that `view` cuts,
  its summands and their sizes."""

  def __init__(self, letters: str, paths, shapes, config: ModelConfig):
    self.letters = letters
    # A path ends in the letters of all dimensions, those of stacked ones first.
    suffixes = [path.rpartition("_")[2] for path in paths]
    self.arrays = [name[-len(shape) :] for name, shape in zip(suffixes, shapes, strict=True)]
    if "k" not in letters:  # a layout with as many keys as queries
      self.arrays = [array.replace("k", "n") for array in self.arrays]
    self.sizes = [dict(zip(*each, strict=True)) for each in zip(self.arrays, shapes, strict=True)]
    self.groups, shape = [], []
    for several, one in re.findall(r"\(([^)]*)\)|(.)", letters.replace("I", "i")):
      before, star, after = (several or one).partition("*")
      groups = [[before], [after] * len(paths)] if star else [before.split("+")]
      groups = [(summands, self._sizes(summands)) for summands in groups]
      self.groups += groups
      shape.append(math.prod(sum(sizes) for _, sizes in groups))
    if "I" in letters:
      at, vision = letters.index("I"), config.vision
      shape[at : at + 1] = vision.channels, vision.patch, vision.patch
    self.shape = tuple(shape)

  def _sizes(self, summands: list) -> list[int]:
    sizes, arrays = [], iter(self.sizes)
    for each in summands:
      fixed = each.isdigit()
      sizes.append(int(each) if fixed else math.prod(map(next(arrays).get, each)))
    return sizes

  def view(self, array, number: int) -> np.ndarray:
    """Our array of this number as a view of the tensor, which is contiguous."""
    cut, spelled = [], ""
    for summands, sizes in self.groups:
      kept = [i for i, each in enumerate(summands) if not each.isdigit()] or [0]
      at = kept[number % len(kept)]
      cut.append(slice(sum(sizes[:at]), sum(sizes[: at + 1])))
      spelled += summands[at].strip("1")
    array = array.reshape([sum(sizes) for _, sizes in self.groups])[tuple(cut)]
    array = array.reshape([self.sizes[number][letter] for letter in spelled])
    return array.transpose([spelled.index(letter) for letter in self.arrays[number]])
