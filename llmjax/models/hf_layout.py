"""How another project lays a tensor out, as an expression of letters, and moving it both ways.

A table has a row for each module, a norm or a projection whose first dimension is what it makes:
their name → ours; the letters are those of our weights. `{q,k}_proj` → `{query,key}` is two rows in
one, `qk_proj` → `{query,key}` one tensor that holds two of our weights. Any other tensor has a row
of its own: its name → (letters of its layout, our path or paths).

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
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.hf_family import note


class Tensors(Mapping):
  """Tensors by name, each read when it is asked for.

  Args:
    readers: name → function that reads the array.
  """

  def __init__(self, readers: dict[str, Callable[[], np.ndarray]]):
    self.readers = readers

  def __getitem__(self, name: str) -> np.ndarray:
    return self.readers[name]()

  def __iter__(self):
    return iter(self.readers)

  def __len__(self):
    return len(self.readers)


def from_tensors(
  config: ModelConfig, tensors: Mapping, table: dict, offset: float = 0.0, optional: tuple = ()
) -> nnx.Module:
  """Builds a model from tensors under another project's names.

  Args:
    config: the architecture.
    tensors: numpy arrays by their name; each is asked for once.
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
  for name, letters, paths, before in _rows(table, shapes):
    names, counts = _names(name, shapes[paths[0]], before)
    missing = [each for each in names if each not in left]
    if missing and all(matches(path, optional) for path in paths):
      continue
    if missing:
      raise UserError(f"tensor {missing[0]!r} (for {', '.join(paths)}) is missing")
    left -= set(names)
    targets = [(path, shapes[path][len(counts) :]) for path in paths]
    taken = [unpack(tensors[each], letters, targets, config, each) for each in names]
    for path, *arrays in zip(paths, *taken, strict=True):
      array = np.stack(arrays).reshape(shapes[path]) if counts else arrays[0]
      made[path] = array + np.float32(offset) if offset and is_scale(path) else array
  if left:
    shown = ", ".join(sorted(left)[:4])
    raise UserError(f"{len(left)} tensors have no place in the model: {shown}")
  made |= _blanks({path: shape for path, shape in shapes.items() if path not in made}, optional)
  return jax.tree.map(jnp.asarray, tree.unflatten(like, made))


def _blanks(shapes: dict, optional: tuple) -> dict[str, np.ndarray]:
  """What stands in for the weights that no tensor holds, if they may be missing."""
  for path in shapes:
    if not matches(path, optional):
      raise UserError(f"no tensor of this layout holds the model's {path!r}")
  if shapes:
    note(f"no tensors for {', '.join(shapes)}: identity matrices, scales of 1 and zeros stand in")
  return {path: _blank(path, shape) for path, shape in shapes.items()}


def _blank(path, shape):
  if is_scale(path):
    return np.ones(shape, np.float32)
  if path.endswith("_id") and shape[0] == shape[1]:
    return np.eye(shape[0], dtype=np.float32)
  return np.zeros(shape, np.float32)


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
  for name, letters, paths, before in _rows(table, {path: a.shape for path, a in leaves.items()}):
    arrays = [np.asarray(leaves[path], np.float32) for path in paths]
    if offset and is_scale(paths[0]):
      arrays = [array - np.float32(offset) for array in arrays]
    left -= set(paths)
    names, counts = _names(name, arrays[0].shape, before)
    for each, index in zip(names, np.ndindex(counts), strict=True):
      tensors[each] = pack([array[index] for array in arrays], letters, paths, config)
  if left:
    raise UserError(f"this layout has no tensor for {sorted(left)[0]!r} ({len(left)} weights)")
  return tensors


def _names(name: str, shape: tuple, before: int) -> tuple[list[str], tuple]:
  """A row's tensors in order, and the dimensions of ours that count them; layers from `before`."""
  counted = [letter for letter in "le" if f"{{{letter}}}" in name]
  counts = shape[: len(counted)]
  start = {"l": before, "e": 0}
  return [
    name.format(**{letter: start[letter] + i for letter, i in zip(counted, index, strict=True)})
    for index in np.ndindex(counts)
  ], counts


def _rows(table, shapes):
  """The rows that this architecture has: (name of a tensor, letters, paths, layers before it)."""
  dense = {path.replace("/first/", "/blocks/"): path for path in shapes if "/first/" in path}
  for name, letters, paths in _held_rows(table, dense):
    yield name, letters, tuple(dense[path] for path in paths), 0
  before = next((shapes[path][0] for path in dense.values()), 0)
  rest = [path for path in shapes if "/first/" not in path]
  for row in _held_rows(table, rest):
    yield *row, before


def _held_rows(table, leaves):
  held = {}  # (module, bias or weight) → (path, letters)
  for path in leaves:
    module, bias, letters = re.fullmatch(r"(.+?)(?:/scale|[/_](bias))?_([a-z]+)", path).groups()
    held[module, bias or "weight"] = path, letters
  for name, row in table.items():
    if isinstance(row, str):
      yield from _module_rows(_listed(name), _listed(row), held)
      continue
    letters, paths = row
    paths = (paths,) if isinstance(paths, str) else paths
    if paths[0] in leaves:
      yield name, letters, paths


def _listed(name: str) -> list[str]:
  """`{a,b}_c` → `a_c`, `b_c`; braces without a comma stay."""
  before, words, after = re.fullmatch(r"(.*?)(?:\{(\w+,[\w,]+)\}(.*))?", name).groups()
  return [before + word + after for word in words.split(",")] if words else [name]


def _module_rows(theirs: list, ours: list, held: dict):
  """Rows of as many modules on both sides, or of one of theirs that holds several of ours."""
  if len(theirs) > 1:
    for one, other in zip(theirs, ours, strict=True):
      yield from _module_rows([one], [other], held)
    return
  for kind in ("weight", "bias"):
    found = [held[module, kind] for module in ours if (module, kind) in held]
    if found:  # a head's channels stand beside each other, and what is made comes first
      counted = "e" if "{e}" in theirs[0] else ""
      own = [letters.removeprefix(counted) for _, letters in found]
      sides = [re.findall("[nk]h|.", letters)[::-1] for letters in own]
      dimensions = ["+".join(side[0] for side in sides), *sides[0][1:]]
      letters = "".join(each if len(each) == 1 else f"({each})" for each in dimensions)
      yield f"{theirs[0]}.{kind}", letters, tuple(path for path, _ in found)


def matches(name: str, patterns) -> bool:
  """Whether one of these regular expressions is found in a name."""
  return any(re.search(pattern, name) for pattern in patterns)


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
    name: their tensor's.
  Returns:
    fp32 arrays in our layout.
  Raises:
    UserError: the tensor is of another shape.
  """
  layout = _Layout(letters, targets, config)
  if array.shape != layout.shape:
    raise UserError(
      f"tensor {name!r} has shape {array.shape}, which is not {letters} = {layout.shape}"
    )
  array = np.asarray(array, np.float32)
  return [np.ascontiguousarray(layout.view(array, i)) for i in range(len(targets))]


def pack(arrays, letters: str, paths, config: ModelConfig) -> np.ndarray:
  """Puts one of their tensors together: the inverse of `unpack`."""
  targets = [(path, array.shape) for path, array in zip(paths, arrays, strict=True)]
  layout = _Layout(letters, targets, config)
  made = np.zeros(layout.shape, np.float32)
  for i, array in enumerate(arrays):
    layout.view(made, i)[...] = array
  return made


class _Layout:
  """An expression with its sizes: the shape of their tensor, and where in one our arrays are.

  Attributes:
    shape: their tensor's.
    groups: the parts of each dimension as `view` cuts it; joined: these dimensions.
    ours: letters of each of our arrays; sizes: of every letter, likewise.
  """

  def __init__(self, letters, targets, config):
    names = [path.rsplit("/", 1)[-1].rsplit("_", 1)[-1] for path, _ in targets]
    # Names have letters of dimensions that count tensors.
    self.ours = [name[-len(shape) :] for name, (_, shape) in zip(names, targets, strict=True)]
    if "k" not in letters:  # a layout with as many keys as queries
      self.ours = [ours.replace("k", "n") for ours in self.ours]
    shapes = [shape for _, shape in targets]
    self.sizes = [dict(zip(*each, strict=True)) for each in zip(self.ours, shapes, strict=True)]
    self.groups, self.joined, shape = [], [], []
    for several, one in re.findall(r"\(([^)]*)\)|(.)", letters.replace("I", "i")):
      before, star, after = (several or one).partition("*")
      groups = [[before], [after] * len(targets)] if star else [before.split("+")]
      sizes = [sum(self._sizes(parts)) for parts in groups]
      self.groups += groups
      self.joined += sizes
      shape.append(math.prod(sizes))
    self.shape = tuple(shape)
    if "I" in letters:
      at, vision = letters.index("I"), config.vision
      sides = (vision.channels, vision.patch, vision.patch)
      self.shape = (*self.shape[:at], *sides, *self.shape[at + 1 :])

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
    for parts in self.groups:
      kept = [i for i, part in enumerate(parts) if not part.isdigit()] or [0]
      at = kept[number % len(kept)]
      sizes = self._sizes(parts)
      start = sum(sizes[:at])
      cut.append(slice(start, start + sizes[at]))
      spelled += parts[at].strip("1")
    array = array.reshape(self.joined)[tuple(cut)]
    array = array.reshape([self.sizes[number][letter] for letter in spelled])
    return array.transpose([spelled.index(letter) for letter in self.ours[number]])
