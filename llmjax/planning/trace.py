"""A model's layers traced on abstract devices: what a token costs and keeps for the backward pass.

A model is traced once for each remat, on one and two shards of its positions and experts. All
other mesh axes divide what was counted, so a search traces no candidate.
"""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp

from llmjax.data.batch import Batch
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.formulas import abstract_devices, count_program, filled_share
from llmjax.nn.attention.config import AttentionConfig
from llmjax.training.config import Config
from llmjax.training.optim import OptimConfig
from llmjax.training.parameters import combine, split

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
_ROWS = 101  # of a traced batch: a prime that divides no weight, by which activations are told
_KINDS = {
  "all_gather": "all-gather", "psum": "all-reduce", "psum_invariant": "all-reduce",
  "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
  "ragged_all_to_all": "all-to-all", "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Traced:
  """What a trace of all layers, forward and backward, counted for one token of a device.

  Attributes:
    flops: of products and of kernels other than attention's, recomputed ones included.
    attention_flops: of attention's kernels, were every pair of positions computed.
    kept: bytes kept for the backward pass, of all layers.
    host: bytes kept in the host's memory.
    live: bytes in the compute dtype that one layer's backward pass reads.
    sent: bytes passed on, by (kind of collective, mesh axis).
  """

  flops: float
  attention_flops: float
  kept: float
  host: float
  live: float
  sent: dict


@functools.cache
def trace_layers(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int
) -> Traced:
  """Traces the layers of a model on abstract devices that shard positions and experts.

  Args:
    model: the architecture; `remat` and how positions are sharded count.
    groups: `optim.groups`, which say what is trained.
    platform: whose kernels run: tpu, or cpu. A GPU's are not counted; a TPU's stand for them.
    context: devices that positions are sharded over.
    expert: devices that experts are sharded over.
  """
  cycle = len(model.attention.pattern)
  model = dataclasses.replace(model, layers=max(cycle, model.layers // cycle * cycle))
  traced, kept, tokens = _trace_backward(model, groups, platform, context, expert)
  filled = filled_share(model, expert) if model.moe.experts else 1.0
  counted, every_pair = (
    count_program(traced, lambda length, block, share=share: share, filled) for share in (0.0, 1.0)
  )
  kept_bytes = Counter()
  for aval in kept:
    kept_bytes[aval.memory_space.name] += _kept_bytes(aval, model)
  flops = counted.pop("flops")
  return Traced(
    flops=flops / tokens,
    attention_flops=(every_pair["flops"] - flops) / tokens,
    kept=kept_bytes["Device"] / tokens,
    host=kept_bytes["Host"] / tokens,
    live=_live_bytes(dataclasses.replace(model, remat="none"), platform, context, expert),
    sent={
      (_KINDS[primitive], axis): size * context * expert / tokens
      for (primitive, axis), size in counted.items()
    },
  )


@functools.cache
def _live_bytes(model: ModelConfig, platform: str, context: int, expert: int) -> float:
  """Bytes a token that one layer would keep in the compute dtype if nothing were recomputed."""
  layers, moe = len(model.attention.pattern), dataclasses.replace(model.moe, first_k_dense=0)
  model = dataclasses.replace(model, layers=layers, moe=moe)
  groups = OptimConfig().groups
  _, kept, tokens = _trace_backward(model, groups, platform, context, expert, pull_back=False)
  low = jnp.dtype(model.dtype)
  return sum(_kept_bytes(aval, model) for aval in kept if aval.dtype == low) / tokens / layers


def _trace_backward(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int,
  pull_back: bool = True,
) -> tuple:
  """Traces layers: (jaxpr, abstract values kept for the backward pass, tokens of the batch)."""
  attention = dataclasses.replace(model.attention, kernel="auto")
  model = dataclasses.replace(model, scan=True, dropout=0.0, attention=attention)
  ids = jax.ShapeDtypeStruct((_ROWS * expert, model.max_seq_len), jnp.int32)
  source = ids if model.kind == "encoder_decoder" else None
  batch = Batch(ids, segments_bt=ids, positions_bt=ids, source_bs=source)

  weights = abstract(model)

  def backward(trainable, frozen, batch):
    hidden = lambda trainable: combine(weights, trainable, frozen).hidden(batch)[0]  # noqa: E731
    x_btd, pull = jax.vjp(hidden, trainable)
    return pull, pull(x_btd) if pull_back else None

  with jax.sharding.use_abstract_mesh(abstract_devices(platform, context=context, expert=expert)):
    traced, shapes = jax.make_jaxpr(backward, return_shape=True)(*split(weights, groups), batch)
  kept = traced.jaxpr.outvars[: len(jax.tree.leaves(shapes[0]))]
  return traced.jaxpr, [var.aval for var in kept], ids.size


def _kept_bytes(aval, model: ModelConfig) -> int:
  """Bytes of a stack of layers' activations; 0 of weights and of what layers share."""
  if aval.size % _ROWS or aval.ndim < 2 or aval.shape[0] % _ROWS == 0:
    return 0
  size = aval.dtype.itemsize  # a TPU keeps products in the compute dtype, not in that of their sums
  return aval.size * (min(size, DTYPE_BYTES[model.dtype]) if model.remat == "dots" else size)


def trace_of(config: Config, sizes: dict[str, int], platform: str) -> Traced:
  """The trace that stands for a config on a mesh."""
  strategy = config.model.attention.context_parallel if sizes["context"] > 1 else ""
  if sizes["stage"] > 1 and strategy == "ring":  # inside of a pipeline keys are gathered
    strategy = "gather"
  keeps_all = sizes["stage"] > 1 and config.pipeline.schedule == "zb_h1"
  model = alike(config.model, "none" if keeps_all else config.model.remat, strategy)
  expert = sizes["expert"] if model.moe.experts else 1
  return _traced_at(model, config.optim.groups, platform, sizes["context"], expert)


@functools.cache
def _traced_at(
  model: ModelConfig, groups: tuple, platform: str, context: int, expert: int
) -> Traced:
  """Puts a trace together from those of single saved names and of two devices of an axis."""
  names = model.remat.split("+")
  if len(names) > 1:  # each name saves what it saves alone
    full, *each = (
      _traced_at(dataclasses.replace(model, remat=name), groups, platform, context, expert)
      for name in ("full", *names)
    )
    return dataclasses.replace(full, **{
      key: getattr(full, key) + sum(getattr(one, key) - getattr(full, key) for one in each)
      for key in ("flops", "attention_flops", "kept")
    })
  if expert > 1:  # buffers grow with the devices that share experts, what is sent with the others
    moe, one = model.moe, _traced_at(model, groups, platform, context, 1)
    two = trace_layers(model, groups, platform, min(2, context), 2)
    rows = [n * min(moe.top_k, moe.experts // n) for n in (1, 2, expert)]
    grown = (rows[2] - rows[0]) / max(1, rows[1] - rows[0])
    larger = {
      key: getattr(one, key) + grown * (getattr(two, key) - getattr(one, key))
      for key in ("kept", "live")
    }
    exchanged = {
      key: size * 2 * (1 - 1 / expert) for key, size in two.sent.items() if "expert" in key[1]
    }
    return dataclasses.replace(one, **larger, sent=one.sent | exchanged)
  two = trace_layers(model, groups, platform, min(2, context), 1)
  if context <= 2:
    return two  # on more a token's arrays are the same, and more is sent for each further device
  if model.attention.context_parallel == "ring":
    four = trace_layers(model, groups, platform, 4, 1).sent
    sent = {key: size + (four[key] - size) * (context - 2) / 2 for key, size in two.sent.items()}
  else:
    sent = {
      key: size * (context - 1 if key[1] == "context" else 1) for key, size in two.sent.items()
    }
  return dataclasses.replace(two, sent=sent)


@functools.cache
def alike(model: ModelConfig, remat: str = "", context_parallel: str = "") -> ModelConfig:
  """The same for models that differ in settings which change neither weights nor traces."""
  plain = AttentionConfig()
  attention = dataclasses.replace(
    model.attention, block=plain.block,
    context_parallel=context_parallel or plain.context_parallel,
  )
  return dataclasses.replace(model, attention=attention, remat=remat or ModelConfig().remat)
