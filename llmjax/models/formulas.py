"""FLOPs of traced programs by a visitor of equations, shares of attention masks, cache bytes."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.attention.mask import MaskSpec
from llmjax.parallel.mesh import abstract_devices

# Of a collective's operand on one device of n, the bytes that the device passes on.
_PASSED_ON = {
  "all_gather": lambda n: n - 1, "psum": lambda n: 2 * (n - 1) / n,
  "psum_invariant": lambda n: 2 * (n - 1) / n, "reduce_scatter": lambda n: (n - 1) / n,
  "all_to_all": lambda n: (n - 1) / n, "ragged_all_to_all": lambda n: (n - 1) / n,
  "ppermute": lambda n: 1,
}
_PRIME = 8191  # positions of a traced row, which divide no width of a model
# Splash attention's products over (queries' and keys' width, values' width) of a pair of a query
# and a key. The fused backward kernel computes scores, and gradients of weights, values, keys and
# queries.
_ATTENTION = {"fwd": (1, 1), "dkv": (2, 2), "dkv and dq": (3, 2), "dq": (2, 1)}


def count_program(
  jaxpr: core.Jaxpr, seen: Callable[[int, int], float], filled: float = 1.0, length: int = 0
) -> Counter:
  """Counts what a traced program computes and what its `shard_map`s send.

  A multiply-add is two FLOPs; products and kernels alone count. A loop counts by its length, a
  conditional by its branch with most FLOPs, a recomputed body once more where it is computed again.

  Args:
    jaxpr: the program, of global shapes; inside of a `shard_map` they are a device's.
    seen: (length, block) → share of attention's blocks that kernels compute, as `seen_share` gives.
    filled: share of the rows of grouped products that belong to some group, see `filled_share`.
    length: a prime number of positions; products of positions with positions, whose FLOPs it
      divides twice, are then counted under `pairs` as well.
  Returns:
    A counter: `flops` of all devices; under (primitive, mesh axis) the bytes that one device passes
    on.
  """
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as XLA does
  total = Counter()
  for key, size in _counted(jaxpr, functools.partial(kernel_flops, seen=seen, filled=filled)):
    total[key] += size
    if key == "flops" and length and size % length**2 == 0:
      total["pairs"] += size
  return total


def _counted(
  jaxpr, kernel, times: float = 1, devices: int = 1, sizes: dict | None = None, caller: str = ""
) -> Iterator[tuple]:
  """Yields (what is counted, how much) of every equation."""
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    made = [var.aval.shape for var in eqn.outvars]
    if name == "pallas_call":
      operands = [(var.aval.dtype.kind, var.aval.shape) for var in eqn.invars]
      yield "flops", times * devices * kernel(params["name"] or caller, operands, made)
    elif rule := _PRODUCTS.get(name):
      yield "flops", times * devices * rule(params, shapes, made)
    elif name in _PASSED_ON:
      yield from ((key, times * size) for key, size in _sent(eqn, sizes or {}))
    elif name == "cond":
      bodies = (branch.jaxpr for branch in params["branches"])
      branches = [list(_counted(body, kernel, times, devices, sizes, caller)) for body in bodies]
      yield from max(branches, key=lambda found: sum(n for key, n in found if key == "flops"))
    else:
      inner = (times * params["length"] if name == "scan" else times, devices, sizes)
      if name == "shard_map":
        mesh = dict(params["mesh"].shape)
        inner = times, devices * math.prod(mesh[a] for a in params["newly_manual_axes"]), mesh
      for value in params.values():
        body = getattr(value, "jaxpr", value)
        if isinstance(body, core.Jaxpr):
          yield from _counted(body, kernel, *inner, params.get("name", caller))


def _sent(eqn, sizes: dict) -> Iterator[tuple]:
  """The bytes that a device passes on along a collective's axes; nothing where they are 1."""
  axes = eqn.params.get("axis_name", eqn.params.get("axes"))
  axes = [axis for axis in ((axes,) if isinstance(axes, str) else axes) if sizes.get(axis, 1) > 1]
  if not axes:
    return
  sizes_bytes = [var.aval.size * var.aval.dtype.itemsize for var in eqn.invars]
  ragged = eqn.primitive.name == "ragged_all_to_all"  # of buffers on two sides, one is not filled
  size = min(sizes_bytes[:2]) if ragged else sum(sizes_bytes)
  passed_on = _PASSED_ON[eqn.primitive.name](math.prod(sizes[axis] for axis in axes))
  yield (eqn.primitive.name, "+".join(axes)), size * passed_on


def _dot(params, shapes, made) -> int:
  (contracted, _), _ = params["dimension_numbers"]
  return 2 * math.prod(made[0]) * math.prod(shapes[0][axis] for axis in contracted)


def _convolution(params, shapes, made) -> int:
  features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
  return 2 * math.prod(made[0]) * math.prod(shapes[1]) // features


def _grouped(params, shapes, made) -> int:
  """Rows [m, k] times [g, k, n], or summed over: [m, k] and [m, n] make [g, k, n]."""
  return 2 * math.prod(shapes[0]) * made[0][-1]


_PRODUCTS = {
  "dot_general": _dot, "conv_general_dilated": _convolution,
  "ragged_dot_general": _grouped, "ragged_dot": _grouped,
}


def kernel_flops(
  name: str, operands: Sequence[tuple], made: Sequence[tuple], seen: Callable, filled: float
) -> float:
  """Counts the FLOPs of one execution of a kernel by its operands' shapes; 0 if it is not known.

  Attention reads a table of blocks by queries and keys first, of which the side that is never cut
  short tells the block's size; then queries, keys and values. Grouped products read rows before
  weights or other rows, and the width they make is the last of their result.

  Args:
    operands: (dtype's kind, shape) of each; `f` of floats, bfloat16 included.
    seen: as `count_program` takes.
    filled: as `count_program` takes.
  """
  kernel = re.search(r"splash_m\wa_(fwd|dkv|dq)|(gmm)", name)
  arrays = [shape for kind, shape in operands if kind in "fV"]
  if not kernel:
    return 0.0
  if kernel[2]:
    return 2 * filled * math.prod(arrays[0]) * made[0][-1]
  query, key, value = arrays[:3]
  kind = kernel[1]
  if kind == "dkv" and max(map(len, made)) > len(query):
    kind = "dkv and dq"
  blocks = operands[0][1]
  block = key[-2] // blocks[-1] if kernel[1] == "dkv" else query[-2] // blocks[-2]
  score, weigh = _ATTENTION[kind]
  width = score * query[-1] + weigh * value[-1]
  return 2 * math.prod(query[:-1]) * key[-2] * width * seen(key[-2], block)


@functools.cache
def forward_flops_per_token(config: ModelConfig, length: int) -> float:
  """Counts the FLOPs of one token's forward pass, head included, in a row of `length`.

  They are counted in a trace of the model in which attention multiplies every query with every key;
  a query is then charged for the keys that its mask lets it see, (length + 1) / 2 on average in a
  causal row. Of experts those that a token uses count. Training costs three times as much. Of an
  encoder_decoder, the decoder reads `length` tokens and the encoder as many, and both are counted
  for one token.
  """
  attention = dataclasses.replace(config.attention, kernel="direct", block=AttentionConfig().block)
  total, pairs = _traced_forward(dataclasses.replace(
    config, attention=attention, remat="none", scan=True, dropout=0.0, max_seq_len=_PRIME
  ))
  if config.kind == "vision":
    return total / length
  shares = [_seen(config, kind, length) for kind in config.layer_kinds]
  if config.kind == "encoder_decoder":  # the encoder, and the decoder's look at it, see all
    shares += [1.0] * ((config.encoder_layers or config.layers) + config.layers)
  per_key = pairs / _PRIME**2
  return (total - pairs) / _PRIME + per_key * length * sum(shares) / len(shares)


@functools.cache
def _traced_forward(config: ModelConfig) -> tuple[float, float]:
  """FLOPs of one row, whatever its mask, and those of them between positions. Traced for a GPU, on
  which grouped products have a primitive."""
  ids = jax.ShapeDtypeStruct((1, _PRIME), jnp.int32)
  batch = Batch(ids, source_bs=ids if config.kind == "encoder_decoder" else None)
  if config.kind == "vision":
    shape = (1, config.vision.patches, config.vision.patch_numbers)
    batch = Batch(patches_bsi=jax.ShapeDtypeStruct(shape, jnp.float32))
  forward = lambda model, batch: model.logits(model.hidden(batch)[0])  # noqa: E731
  with jax.sharding.use_abstract_mesh(abstract_devices("gpu")):
    traced = jax.make_jaxpr(forward)(abstract(config), batch)
  counted = count_program(traced.jaxpr, lambda length, block: 1.0, length=_PRIME)
  return counted["flops"], counted["pairs"]


@functools.cache
def seen_share(config: ModelConfig, length: int, block: int = 1) -> float:
  """Share of a row's pairs of query and key that lie in blocks which a mask touches.

  The mean over layers, block-sparse ones left out: their kernel is another.

  Args:
    config: architecture, with some layer that is not block-sparse.
    length: positions of a row, one document.
    block: positions of a square block's side; 1 counts the pairs themselves.
  """
  kinds = [kind for kind in config.layer_kinds if kind != "sparse"]
  return sum(_seen(config, kind, length, block) for kind in kinds) / len(kinds)


def filled_share(config: ModelConfig, shards: int) -> float:
  """Share of the buffer for experts' tokens that even load fills.

  A device may be sent all tokens of all devices that share the experts, and has a buffer for them.

  Args:
    config: architecture with experts, each taking any number of tokens.
    shards: devices that experts are sharded over.
  """
  moe = config.moe
  return moe.top_k / (shards * min(moe.top_k, moe.experts // shards))


@functools.cache
def _seen(config: ModelConfig, kind: str, length: int, block: int = 1) -> float:
  """Share of (query, key) pairs of one document in blocks of which the mask allows any pair."""
  spec = config.attention.rule(kind, config.causal)
  if spec.sparse_block:
    return _sparse_seen(spec, length)
  blocks = -(-length // block)
  apart = np.arange(1 - blocks, blocks)  # query block - key block
  nearest = np.maximum(0, abs(apart) * block - (block - 1))
  touched = (apart >= 0) | (not spec.causal)
  touched &= (nearest < spec.window) | (not spec.window)
  return float(((blocks - abs(apart)) * touched).sum() / blocks**2)


def _sparse_seen(spec: MaskSpec, length: int) -> float:
  size = spec.sparse_block
  positions, blocks = np.arange(length), np.arange(-(-length // size))
  apart = abs(blocks[:, None] - blocks)
  near = (apart < spec.sparse_local) | (np.minimum.outer(blocks, blocks) < spec.sparse_global)
  if spec.sparse_stride:
    near |= apart % spec.sparse_stride == 0
  end = positions[:, None] + 1 if spec.causal else length
  keys = np.clip(end - size * blocks, 0, np.minimum(size, length - size * blocks))  # of each block
  return float((keys * near[positions // size]).sum() / length**2)


def cache_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
  """Counts the key/value cache's bytes for each position of a row: 2 · l · k · h · bytes.

  Latent attention keeps l · (kv_rank + rope_dim) numbers.

  LLaMA-7B in fp16: 2 · 32 · 32 · 128 · 2 = 524,288, a GiB at 2,048 positions.
  """
  l, k, h = (config.dims[letter] for letter in "lkh")
  latent = config.attention.latent
  kept = latent.kv_rank + latent.rope_dim if latent.kv_rank else 2 * k * h
  return l * kept * dtype_bytes
