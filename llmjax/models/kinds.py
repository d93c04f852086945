"""Surgery on a model's weights: which matrices are LoRA, quantized or masked, by `model.weights`.
`models/build.py` applies it to every model, abstract ones too, so that state, checkpoints, plans
and loading agree on a config's leaves."""

import math
import zlib

import jax
import jax.numpy as jnp

from llmjax.core import tree
from llmjax.core.choices import check_choice, check_finite
from llmjax.core.config import Options
from llmjax.core.dims import letters_of
from llmjax.core.errors import UserError
from llmjax.core.weight import LoRA, Masked, Quantized, is_kind, scale_skips, split_letters
from llmjax.nn.param import roles

KINDS = ("array", "lora", "int8", "int4", "nf4", "masked")
_BLOCKS = {"int4": 128, "nf4": 64}  # inputs that share a scale
_OPTIONS = {  # of each kind, with defaults
  "array": {},
  "lora": {"rank": 8, "alpha": 16.0, "base": None},
  "int8": {"activations": ""},
  "int4": {"block": _BLOCKS["int4"]},
  "nf4": {"block": _BLOCKS["nf4"]},
  "masked": {"keep": 0.5},
}


def checked_rows(rows) -> tuple:
  """Checks `model.weights`: rows (pattern, {"kind": …, option: value}), options filled in.

  Raises:
    UserError: what a row holds instead.
  """
  for row in rows:
    if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], str)):
      raise UserError(f"model.weights holds {row!r}, not (pattern, {{\"kind\": …, option: value}})")
  return tuple((row[0], _checked(row[1], f"model.weights, pattern {row[0]!r}")) for row in rows)


def _checked(options, where: str) -> Options:
  if not isinstance(options, dict) or "kind" not in options:
    raise UserError(f"{where}: {options!r} is not {{\"kind\": …, option: value}}")
  check_choice(f"{where}: kind", options["kind"], KINDS)
  known = {"kind": options["kind"]} | _OPTIONS[options["kind"]]
  for key, value in options.items():
    check_choice(f"{where}: option", key, tuple(known))
    if key in ("rank", "block") and (type(value) is not int or value < 1):
      raise UserError(f"{where}: {key} {value!r} is not a positive integer")
    if key in ("alpha", "keep"):
      check_finite(f"{where}: {key}", value)
      if type(value) not in (int, float) or value <= 0 or (key == "keep" and value > 1):
        wanted = "in (0, 1]" if key == "keep" else "positive"
        raise UserError(f"{where}: {key} {value!r} is not {wanted}")
    if key == "activations":
      check_choice(f"{where}: activations", value, ("", "int8"))
    if key == "base" and value is not None:
      options = options | {"base": _checked(value, f"{where}: base")}
      if value["kind"] == "lora":
        raise UserError(f"{where}: the base of a LoRA is not a LoRA again")
  return Options(known | options)


def apply_kinds(model, rows: tuple, key):
  """Converts the matrices, embeddings and heads that a row's pattern matches; the first row wins.

  Args:
    key: PRNG key of LoRA's a; its b is zero.
  Returns:
    The module with other leaves, which computes the same but for quantization and masks.
  Raises:
    UserError: a pattern matches no weight that can be of another kind, or none that earlier rows
      leave; a weight cannot be of its kind.
  """
  if not rows:
    return model
  role_of, leaves = roles(model), tree.flatten(model)
  able = [
    path for path, leaf in leaves.items()
    if role_of[path] == "matrix"
    or (role_of[path] == "table" and "v" in letters_of(path, leaf.ndim))
  ]
  matches = tree.first_matches("model.weights", rows, able, "matrices")
  options = {path: wanted for _, wanted, taken in matches for path in taken}

  def change(path, leaf):
    if path not in options:
      return leaf
    leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    letters = letters_of(path, leaf.ndim).removeprefix("l")
    return _convert(leaf, letters, options[path], leaf_key, path)

  return tree.map_with_path(change, model)


def _convert(leaf, letters: str, options: dict, key, path: str):
  kind = options["kind"]
  if kind == "array":
    return leaf
  if kind == "lora":
    base = _convert(leaf, letters, options["base"] or {"kind": "array"}, key, path)
    return _lora(base, leaf, letters, options["rank"], options["alpha"], key)
  if kind == "masked":
    return _masked(leaf, letters, options["keep"])
  return _quantized(leaf, letters, options, path)


def _lora(base, leaf, letters: str, rank: int, alpha: float, key) -> LoRA:
  """a is normal with deviation 1/√inputs, b zero, as in Hu et al. 2021, sec. 4.1."""
  batch, inputs, _ = split_letters(letters)
  shape, stacked = leaf.shape, leaf.ndim - len(letters)
  first = stacked + len(batch)
  middle = first + len(inputs)
  a = jax.random.normal(key, (*shape[:middle], rank), jnp.float32)
  a = a / math.sqrt(math.prod(shape[first:middle]))
  b = jnp.zeros((*shape[:first], rank, *shape[middle:]), jnp.float32)
  return LoRA(base, a, b, alpha / rank, letters)


def _masked(leaf, letters: str, keep: float) -> Masked:
  axes = tuple(range(leaf.ndim - len(letters), leaf.ndim))
  least = jnp.quantile(jnp.abs(leaf), 1 - keep, axis=axes, keepdims=True)
  return Masked(leaf, (jnp.abs(leaf) >= least).astype(jnp.int8), letters)


def _quantized(leaf, letters: str, options: dict, path: str) -> Quantized:
  from qwix import quantize  # takes two seconds to import

  how, stacked = options["kind"], leaf.ndim - len(letters)
  inputs = [stacked + letters.index(letter) for letter in scale_skips(letters)]
  if how == "int8":
    if options["activations"] and letters[0] in "er" and len(letters) > 2:
      raise UserError(
        f"model.weights: activations={options['activations']!r} would change nothing for {path!r}: "
        "grouped products of experts and products with latents decode their weights first"
      )
    channels = [dim for dim in range(leaf.ndim) if dim not in inputs]
    array = quantize(leaf, "int8", channelwise_axes=channels)
    scale = jnp.squeeze(array.scale, inputs)
    return Quantized(array.qvalue, scale, None, "int8", letters, options["activations"])
  dim = inputs[-1]
  block = math.gcd(options["block"], leaf.shape[dim])
  if leaf.shape[dim] % 2:
    raise UserError(f"model.weights: {path!r} has {leaf.shape[dim]} inputs, {how} packs pairs")
  others = [other for other in range(leaf.ndim) if other != dim]
  array = quantize(leaf, how, channelwise_axes=others, tiled_axes={dim: block})
  codes = array.qvalue.astype(jnp.int8) + (8 if how == "int4" else 0)
  codes = codes.astype(jnp.uint8).reshape(
    *leaf.shape[:dim], leaf.shape[dim] // 2, 2, *leaf.shape[dim + 1 :]
  )
  low, high = (jax.lax.index_in_dim(codes, i, dim + 1, keepdims=False) for i in (0, 1))
  codes = low | (high << 4)
  if how == "int4":
    return Quantized(codes, array.scale, None, how, letters)
  offset = jnp.mean(array.scale, inputs)
  centred = array.scale - jnp.expand_dims(offset, inputs)
  scale = _quantized(centred, letters, {"kind": "int8", "activations": ""}, path)
  return Quantized(codes, scale, offset, how, letters)


def merged(model):
  """Replaces every weight by the fp32 array that it represents, for export."""

  def merge(leaf):
    if not is_kind(leaf):
      return leaf
    if not isinstance(leaf, LoRA):
      return leaf.decode(jnp.float32)
    batch, inputs, outputs = split_letters(leaf.letters)
    stacked = leaf.ndim - len(leaf.letters)
    batch = "l" * stacked + batch
    eq = f"{batch}{inputs}a,{batch}a{outputs}->{batch}{inputs}{outputs}"
    return merge(leaf.base) + leaf.scale * jnp.einsum(eq, merge(leaf.a), merge(leaf.b))

  return jax.tree.map(merge, model, is_leaf=is_kind)
