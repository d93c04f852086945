"""Weight kinds: what may stand in place of a parameter array. A weight is a sum of products of
leaves: an array is one, `LoRA(base, a, b)` is base + s·a·b. A leaf decodes to an array in the
compute dtype and takes that array's gradient back; products ask for no more, so kinds nest and no
layer knows them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.tree import flatten


@dataclasses.dataclass(frozen=True)
class ShardSpec:
  """Where `fsdp` cuts an array.

  Attributes:
    axis: name of the mesh axis.
    dim: dimension, counted from the end (-1 is the last), so that stacking layers changes nothing.
    reduce_dtype: dtype in which gradients are summed over the axis.
  """

  axis: str
  dim: int
  reduce_dtype: str


def kind(*parts: str, fixed: tuple[str, ...] = ()) -> Callable:
  """Registers a dataclass as a weight kind.

  A part's place in a tree path is its name and its letters, `a_da`, as of any other weight; so
  partition specs, moments and checkpoints read it like any array.

  Args:
    parts: names of the fields that hold arrays or other kinds; all others are static.
    fixed: those of them that are never trained.
  """

  def register(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    static = [field.name for field in dataclasses.fields(cls) if field.name not in parts]
    cls.parts, cls.fixed = parts, fixed

    def flatten(self):
      keys = (jax.tree_util.GetAttrKey(f"{name}_{self.part_letters(name)}") for name in parts)
      children = [(key, getattr(self, name)) for key, name in zip(keys, parts, strict=True)]
      return children, tuple(getattr(self, name) for name in static)

    def unflatten(values, children):
      self = object.__new__(cls)
      both = dict(zip(static, values, strict=True)) | dict(zip(parts, children, strict=True))
      for name, value in both.items():
        object.__setattr__(self, name, value)
      return self

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls

  return register


class Weight:
  """What all kinds answer; `letters` are those of the weight it stands for, without `l`."""

  letters: str

  def part_letters(self, name: str) -> str:
    """Letters of a part; by default those of the weight."""
    return self.letters

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight it stands for."""
    return getattr(self, self.parts[0]).shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def summands(self) -> list[tuple]:
    """Terms of the sum: a leaf, or (factor, two leaves to multiply, letters of each)."""
    return [self]


@kind("array")
class ShardedWeight(Weight):
  """An array that `fsdp` cuts: outside a `shard_map` over it the global one, inside a shard.

  Inside it is gathered for each product, in the narrower of its dtype and the compute dtype, and
  its gradient is summed and scattered.

  Attributes:
    array: the weight.
    spec: where it is cut.
    letters: of the weight.
  """

  array: jax.Array
  spec: ShardSpec
  letters: str

  @property
  def dtype(self):
    return self.array.dtype

  def _inside(self) -> bool:
    return self.spec.axis in jax.sharding.get_abstract_mesh().manual_axes

  def cast(self, dtype):
    wide = jnp.issubdtype(self.array.dtype, jnp.floating)
    wide = wide and self.array.dtype.itemsize > jnp.dtype(dtype).itemsize
    return dataclasses.replace(self, array=self.array.astype(dtype)) if wide else self

  def decode(self, dtype=None):
    full = self.array
    if self._inside():
      dim = self.spec.dim % full.ndim
      full = jax.lax.all_gather(full, self.spec.axis, axis=dim, tiled=True)
    return full if dtype is None else full.astype(dtype)

  def pull(self, grad, like):
    if self._inside():
      low = grad.astype(self.spec.reduce_dtype)
      dim = self.spec.dim % low.ndim
      low = jax.lax.psum_scatter(low, self.spec.axis, scatter_dimension=dim, tiled=True)
      grad = low.astype(grad.dtype)
    return dataclasses.replace(self, array=grad.astype(like.array.dtype))


@kind("base", "a", "b", fixed=("base",))
class LoRA(Weight):
  """base + scale · a b, of which a and b are trained.

  Attributes:
    base: weight of any other kind.
    a: [inputs, rank].
    b: [rank, outputs].
    scale: alpha / rank.
    letters: of the weight.
  Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1.
  """

  base: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float
  letters: str

  def part_letters(self, name):
    batch, inputs, outputs = split_letters(self.letters)
    return {"base": self.letters, "a": batch + inputs + "a", "b": batch + "a" + outputs}[name]

  @property
  def dtype(self):
    return self.base.dtype

  def cast(self, dtype):
    return dataclasses.replace(
      self, base=cast(self.base, dtype), a=cast(self.a, dtype), b=cast(self.b, dtype)
    )

  def summands(self):
    letters = self.part_letters("a"), self.part_letters("b")
    return [*summands(self.base), (self.scale, (self.a, self.b), letters)]


@kind("codes", "scale", "offset", fixed=("codes", "scale", "offset"))
class Quantized(Weight):
  """A frozen weight as codes of 8 or 4 bits and scales.

  Attributes:
    codes: int8; or two 4-bit codes a byte, packed along the last input dimension.
    scale: of each output channel (int8), of each block of inputs (int4), or with nf4 int8 codes of
      the blocks' scales together with fp32 scales of these: double quantization.
    offset: mean of the blocks' scales, subtracted before they were quantized; None otherwise.
    how: int8, int4 or nf4.
    letters: of the weight.
    activations: `int8` multiplies int8 by int8, quantizing each row of the activation by its
      largest value; "" decodes the weight first.
  Source: nf4 and double quantization: Dettmers et al. 2023, arXiv:2305.14314, sec. 3; int8
    products: Dettmers et al. 2022, arXiv:2208.07339, sec. 2.
  """

  codes: jax.Array
  scale: "jax.Array | Quantized"
  offset: jax.Array | None
  how: str
  letters: str
  activations: str = ""

  def part_letters(self, name):
    letters = self.letters
    if name == "codes" or (name == "scale" and self.how != "int8"):
      return letters
    return "".join(letter for letter in letters if letter not in scale_skips(letters))

  @property
  def shape(self):
    shape = list(self.codes.shape)
    if self.how != "int8":
      shape[_block_dim(self.letters)] *= 2
    return tuple(shape)

  @property
  def dtype(self):
    return jnp.dtype(jnp.float32)

  def cast(self, dtype):
    return self

  def decode(self, dtype=None):
    from qwix import QArray, dequantize  # imports for two seconds

    codes, scale = decode(self.codes), decode(self.scale, jnp.float32)
    if self.how == "int8":
      scale = self._channels(scale)
    else:
      dim = codes.ndim + _block_dim(self.letters)
      pairs = jnp.stack([codes & 15, codes >> 4], axis=dim + 1)
      codes = pairs.reshape(*codes.shape[:dim], 2 * codes.shape[dim], *codes.shape[dim + 1 :])
    if self.how == "int4":
      codes = codes.astype(jnp.int8) - 8
    if self.offset is not None:
      scale = scale + self._channels(decode(self.offset, jnp.float32))
    qtype = "nf4" if self.how == "nf4" else jnp.int8
    return dequantize(QArray(codes, scale, None, qtype)).astype(dtype or jnp.float32)

  def _channels(self, values):
    """Values of output channels, with dimensions of one where there are inputs."""
    skipped = scale_skips(self.letters)
    stacked = values.ndim - (len(self.letters) - len(skipped))
    dims = [stacked + i for i, letter in enumerate(self.letters) if letter in skipped]
    return jnp.expand_dims(values, dims)

  def pull(self, grad, like):
    return zero_cotangent(self)


@kind("base", "mask", fixed=("mask",))
class Masked(Weight):
  """base where a mask is 1, and 0 elsewhere; nothing is trained there.

  Attributes:
    base: leaf.
    mask: int8 zeros and ones.
    letters: of the weight.
  """

  base: jax.Array
  mask: jax.Array
  letters: str

  @property
  def dtype(self):
    return self.base.dtype

  def cast(self, dtype):
    return dataclasses.replace(self, base=cast(self.base, dtype))

  def decode(self, dtype):
    return decode(self.base, dtype) * decode(self.mask, dtype)

  def pull(self, grad, like):
    base = pull(self.base, grad * decode(self.mask, grad.dtype), like.base)
    return dataclasses.replace(self, base=base, mask=zero_cotangent(self.mask))


def is_kind(leaf) -> bool:
  """Whether a node of a tree is a weight of a kind other than array."""
  return isinstance(leaf, Weight)


def is_sharded(leaf) -> bool:
  """Whether a node of a tree is an array that `fsdp` cuts."""
  return isinstance(leaf, ShardedWeight)


def summands(w) -> list[tuple]:
  """A weight as a sum, as `Weight.summands` gives it."""
  return w.summands() if is_kind(w) else [w]


def fixed_paths(model) -> set[str]:
  """Paths of arrays that their kind never trains: codes, scales, masks, the base of a LoRA."""

  def inside(path, node, fixed):
    if not is_kind(node):
      return {path} if fixed else set()
    children = {f"{path}/{name}_{node.part_letters(name)}": name for name in node.parts}
    return set().union(*(
      inside(child, getattr(node, name), fixed or name in node.fixed)
      for child, name in children.items() if getattr(node, name) is not None
    ))

  nodes = flatten(model, is_leaf=is_kind)
  return set().union(*(inside(path, node, False) for path, node in nodes.items()))


def cast(leaf, dtype):
  """What a backward pass keeps of a leaf: an array in the compute dtype, codes as they are."""
  return leaf.cast(dtype) if is_kind(leaf) else leaf.astype(dtype)


def decode(leaf, dtype=None):
  """The array that a leaf stands for, complete and in a dtype; None keeps an array's own."""
  if is_kind(leaf):
    return leaf.decode(dtype)
  return leaf if dtype is None else leaf.astype(dtype)


def pull(leaf, grad, like):
  """The gradient of a leaf's parts from the fp32 gradient of the array it decodes to.

  Args:
    like: the leaf with arrays of the dtypes that gradients are wanted in.
  """
  return leaf.pull(grad, like) if is_kind(leaf) else grad.astype(like.dtype)


def grad_dtype(leaf, like):
  """The dtype in which a leaf's gradient leaves the product: that in which devices are summed."""
  if isinstance(leaf, ShardedWeight):
    return leaf.spec.reduce_dtype
  return jnp.float32 if is_kind(leaf) else like.dtype


def zero_cotangent(tree):
  """A gradient of nothing: zeros for floats, what jax wants in their place for integers."""

  def zero(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      return jnp.zeros(leaf.shape, leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)

  return jax.tree.map(zero, tree)


def split_letters(letters: str) -> tuple[str, str, str]:
  """Splits a weight's letters: `dnh` is ("", "d", "nh"), `nhd` ("", "nh", "d").

  Returns:
    (batch: experts; inputs; outputs).
  """
  batch = "e" if letters.startswith("e") and len(letters) > 2 else ""
  rest = letters[len(batch) :]
  inputs = 2 if rest[:2] in ("nh", "kh") else 1
  return batch, rest[:inputs], rest[inputs:]


def scale_skips(letters: str) -> str:
  """Letters that share an int8 weight's scale: its inputs; in a table, a row's channels."""
  return "d" if letters in ("vd", "td") else split_letters(letters)[1]


def _block_dim(letters: str) -> int:
  """Dimension along which blocks of 4-bit codes run, counted from the end."""
  return letters.index(scale_skips(letters)[-1]) - len(letters)
