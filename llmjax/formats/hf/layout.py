"""How another project lays a tensor out, as an expression of letters, and moving it both ways.

A table has a row for each module, a norm or a projection whose first dimension is what it makes:
their name → ours; the letters are those of our weights. `{q,k}_proj` → `{query,key}` is two rows in
one, if ours has both; `qk_proj` → `{query,key}` one tensor that holds two of our weights. The first
row that names a module has it. Any other tensor has a row of its own: its name → (letters of its
layout, our path or paths).

- `d(nh)`: two dimensions, the second holding heads × head width in one; `{l}` in a name counts the
  layers and `{e}` the experts, which stand in one array here. Rows name `blocks`; they hold for the
  dense layers `first` as well.
- `d(nh+kh+kh)`: several of our arrays one after another, and as many paths.
- `(n*h)d`: what stands behind the star of one array after that of another, for each n.
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
  """Tensors by name, made of functions: each reads its tensor when that is asked for."""

  def __getitem__(self, name: str) -> np.ndarray:
    return self.data[name]()


def from_tensors(
  config: ModelConfig, tensors: Mapping, table: dict, offset: float = 0.0, optional: tuple = ()
) -> nnx.Module:
  """Builds a model from tensors under another project's names.

  Args:
    config: the architecture.
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
  made, left = {}, set(tensors)
  for names, paths, layout in _rows(config, table, shapes):
    missing = [name for name in names if name not in left]
    if missing and all(matches(path, optional) for path in paths):
      continue
    if missing:
      raise UserError(f"tensor {missing[0]!r} (for {', '.join(paths)}) is missing")
    left -= names.keys()
    for name, index in names.items():
      array = tensors[name]
      if array.shape != layout.shape:
        raise UserError(
          f"tensor {name!r} has shape {array.shape}, which is not {layout.letters} = {layout.shape}"
        )
      for number, path in enumerate(paths):
        if path not in made:
          made[path] = np.empty(shapes[path], np.float32)
        made[path][index] = layout.view(array, number)
  if left:
    shown = ", ".join(sorted(left)[:4])
    raise UserError(f"{len(left)} tensors have no place in the model: {shown}")
  if offset:
    made |= {path: made[path] + np.float32(offset) for path in made.keys() & scales(config)}
  rest = {path: shape for path, shape in shapes.items() if path not in made}
  made |= _blanks(rest, optional, scales(config))
  return jax.tree.map(jnp.asarray, tree.unflatten(like, made))


def _blanks(shapes: dict, optional: tuple, ones: set) -> dict[str, np.ndarray]:
  """What stands in for the weights that no tensor holds, if they may be missing."""
  made = {}
  for path, shape in shapes.items():
    if not matches(path, optional):
      raise UserError(f"no tensor of this layout holds the model's {path!r}")
    square = path.endswith("_id") and shape[0] == shape[1]
    made[path] = np.eye(shape[0]) if square else np.full(shape, float(path in ones))
  if made:
    note(f"no tensors for {', '.join(made)}: identity matrices, scales of 1 and zeros stand in")
  return {path: array.astype(np.float32) for path, array in made.items()}


def to_tensors(
  config: ModelConfig, leaves: Mapping, table: dict, offset: float = 0.0
) -> dict[str, np.ndarray]:
  """Lays weights by path out under another project's names: the inverse of `from_tensors`.

  Returns:
    fp32 arrays by their name.
  Raises:
    UserError: a weight that no row of the table holds.
  """
  tensors, left = {}, set(leaves)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  for names, paths, layout in _rows(config, table, shapes):
    arrays = [np.asarray(leaves[path], np.float32) for path in paths]
    if offset and paths[0] in scales(config):
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
  """The rows that this architecture has: ({name of a tensor: its place in ours}, paths, layout)."""
  dense = {path.replace("/first/", "/blocks/"): path for path in shapes if "/first/" in path}
  before = next((shapes[path][0] for path in dense.values()), 0)
  rest = {path: path for path in shapes if "/first/" not in path}
  for first, known in ((0, dense), (before, rest)):
    for name, letters, modules in _held_rows(table, known):
      paths = [known[path] for path in modules]
      counted = [letter for letter in "le" if f"{{{letter}}}" in name]
      names = {}
      for index in np.ndindex(shapes[paths[0]][: len(counted)]):
        layer, expert = (*index, 0, 0)[:2]
        names[name.format(l=first + layer, e=expert)] = index
      own = [shapes[path][len(counted) :] for path in paths]
      yield names, paths, _Layout(letters, paths, own, config)


def _held_rows(table: dict, paths):
  """The rows that hold some of these paths: (name, letters, paths)."""
  held = {}  # (module, bias or weight) → (letters, path)
  for path in paths:
    module, bias, letters = re.fullmatch(r"(.+?)(?:/scale|[/_](bias))?_([a-z]+)", path).groups()
    held[module, bias or "weight"] = letters, path
  for name, row in table.items():
    if not isinstance(row, str):
      letters, own = row
      own = (own,) if isinstance(own, str) else own
      if own[0] in paths:
        yield name, letters, own
      continue
    theirs, ours = _listed(name), _listed(row)
    if len(theirs) == 1:  # of a tensor that holds several modules
      ours = [ours]
    elif all((module, "weight") in held for module in ours):
      ours = [[module] for module in ours]
    else:
      continue
    for one, modules in zip(theirs, ours, strict=True):
      for kind in ("weight", "bias"):
        found = [held.pop((module, kind)) for module in modules if (module, kind) in held]
        if found:
          letters, own = zip(*found, strict=True)
          yield f"{one}.{kind}", _side_by_side(letters, "{e}" in one), own


def _listed(name: str) -> list[str]:
  """`{a,b}_c` → `a_c`, `b_c`; braces without a comma stay."""
  before, words, after = re.fullmatch(r"(.*?)(?:\{(\w+,[\w,]+)\}(.*))?", name).groups()
  return [before + word + after for word in words.split(",")] if words else [name]


def _side_by_side(letters, counted: bool) -> str:
  """The layout of modules' weights in one tensor, from ours: what is made stands first."""
  own = [each.removeprefix("e") if counted else each for each in letters]
  sides = [re.findall("[nk]h|.", each)[::-1] for each in own]  # a head's channels are together
  dimensions = ["+".join(side[0] for side in sides), *sides[0][1:]]
  return "".join(each if len(each) == 1 else f"({each})" for each in dimensions)


def matches(name: str, patterns) -> bool:
  """Whether one of these regular expressions is found in a name."""
  return any(re.search(pattern, name) for pattern in patterns)


def scales(config: ModelConfig) -> set[str]:
  """Paths of all norms' scales."""
  return {path for path, role in roles(abstract(config)).items() if role == "scale"}


class _Layout:
  """An expression with its sizes: the shape of their tensor, and where in one our arrays are.

  Attributes:
    letters: the expression.
    shape: their tensor's.
    groups: the parts of each dimension as `view` cuts it, and their sizes.
    ours: letters of each of our arrays; sizes: of every letter, likewise.
  """

  def __init__(self, letters: str, paths, shapes, config: ModelConfig):
    self.letters = letters
    # Names have letters of dimensions that count tensors.
    names = [path.rpartition("_")[2] for path in paths]
    self.ours = [name[-len(shape) :] for name, shape in zip(names, shapes, strict=True)]
    if "k" not in letters:  # a layout with as many keys as queries
      self.ours = [ours.replace("k", "n") for ours in self.ours]
    self.sizes = [dict(zip(*each, strict=True)) for each in zip(self.ours, shapes, strict=True)]
    self.groups, shape = [], []
    for several, one in re.findall(r"\(([^)]*)\)|(.)", letters.replace("I", "i")):
      before, star, after = (several or one).partition("*")
      groups = [[before], [after] * len(paths)] if star else [before.split("+")]
      groups = [(parts, self._sizes(parts)) for parts in groups]
      self.groups += groups
      shape.append(math.prod(sum(sizes) for _, sizes in groups))
    if "I" in letters:
      at, vision = letters.index("I"), config.vision
      shape[at : at + 1] = vision.channels, vision.patch, vision.patch
    self.shape = tuple(shape)

  def _sizes(self, parts: list) -> list[int]:
    """Sizes of a dimension's parts: each of an array of its own, or one of all alike."""
    sizes, arrays = [], iter(self.sizes)
    for part in parts:
      own = {} if part.isdigit() else next(arrays)
      sizes.append(int(part) if part.isdigit() else math.prod(own[letter] for letter in part))
    return sizes

  def view(self, array, number: int) -> np.ndarray:
    """Our array of this number as a view of theirs, which is contiguous."""
    cut, spelled = [], ""
    for parts, sizes in self.groups:
      kept = [i for i, part in enumerate(parts) if not part.isdigit()] or [0]
      at = kept[number % len(kept)]
      cut.append(slice(sum(sizes[:at]), sum(sizes[: at + 1])))
      spelled += parts[at].strip("1")
    array = array.reshape([sum(sizes) for _, sizes in self.groups])[tuple(cut)]
    array = array.reshape([self.sizes[number][letter] for letter in spelled])
    return array.transpose([spelled.index(letter) for letter in self.ours[number]])
