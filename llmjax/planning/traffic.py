"""What a training step sends along each mesh axis, from shardings and traces.

Bytes are what one device passes on, not what is complete there: of a gathered array the other
devices' shares. The compiled program is held to the same in tests/multidevice/test_budget.py.
"""

import math
from collections import Counter
from collections.abc import Iterator

from llmjax.parallel.collectives import Collective
from llmjax.parallel.schedules import make_schedule
from llmjax.planning.cost import micro_batch_tokens, sharded_bytes, state_leaves
from llmjax.planning.trace import DTYPE_BYTES, trace_of
from llmjax.training.config import Config


def collective_bytes(config: Config, sizes: dict[str, int]) -> list[Collective]:
  """Lists what a device passes on in one step: one entry for each kind of collective and mesh axis.

  What attention and experts send is read from their trace; the rest follows from the shardings of
  weights and batch.
  """
  total = Counter()
  for rule in (_weight_bytes, _gradient_bytes, _activation_bytes):
    for kind, axis, size in rule(config, sizes):
      axes = tuple(each for each in axis.split("+") if sizes[each] > 1)
      total[kind, axes] += size * bool(axes)
  return [Collective(kind, axes, size) for (kind, axes), size in total.items() if size]


def _weight_bytes(config: Config, sizes) -> Iterator[tuple]:
  """Weights gathered over `fsdp`, for each micro-batch of ZeRO 3, else once after the update."""
  # Layers are gathered in the compute dtype on the way forward and back (a pipeline's stage goes
  # forward twice), the head once; of the token table rows are exchanged.
  model, train = config.model, config.train
  (trainable, frozen, _), others = state_leaves(config, 3), 1 - 1 / sizes["fsdp"]
  if train.zero_stage < 3:
    yield "all-gather", "fsdp", sharded_bytes(trainable, sizes, "fsdp") * others
    return
  low, times = DTYPE_BYTES[model.dtype], 2 if sizes["stage"] == 1 else 3
  layers = Counter({
    (axes, number): size * min(1, low / number)
    for (axes, number), size in (trainable + frozen).items() if axes >= {"stage", "fsdp"}
  })
  gathered = times * sharded_bytes(layers, sizes, "fsdp")
  gathered += low * model.vocab_size * model.width / sizes["tensor"]
  yield "all-gather", "fsdp", train.grad_accum_steps * gathered * others
  stream = micro_batch_tokens(config, sizes) * model.width * low / sizes["tensor"]
  yield "all-to-all", "fsdp", 2 * train.grad_accum_steps * stream * others


def _gradient_bytes(config: Config, sizes) -> Iterator[tuple]:
  """Gradients summed over every axis that does not shard their weight, for each micro-batch."""
  train, times = config.train, config.train.grad_accum_steps
  tables = 1 if config.model.tie_embeddings else 2
  for (axes, number), size in state_leaves(config, 3)[0].items():
    here = size / math.prod(sizes[axis] for axis in axes)
    if "fsdp" in axes:
      full, others = here * sizes["fsdp"], 1 - 1 / sizes["fsdp"]
      if train.zero_stage == 3:
        if "stage" not in axes:
          full /= tables  # the token table's gradient comes back in exchanged rows
        sums = DTYPE_BYTES[train.grad_reduce_dtype] / number
        yield "reduce-scatter", "fsdp", times * sums * full * others
      elif train.zero_stage == 2:
        yield "reduce-scatter", "fsdp", times * full * others
      else:
        yield "all-reduce", "fsdp", 2 * times * full * others
        here = full
    for axis in {"data", "context", "expert", "stage"} - axes:
      again = 1 if axis == "stage" else times
      yield "all-reduce", axis, 2 * again * here * (1 - 1 / sizes[axis])


def _activation_bytes(config: Config, sizes) -> Iterator[tuple]:
  """The residual stream between tensor's halves and pipeline's stages; what layers' traces sent.

  Source: of `tensor`: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.
  """
  model, times = config.model, config.train.grad_accum_steps
  tokens = times * micro_batch_tokens(config, sizes)
  stream, others = tokens * model.width * DTYPE_BYTES[model.dtype], 1 - 1 / sizes["tensor"]
  layers = model.layers / sizes["stage"]
  again = model.remat != "none" or sizes["stage"] > 1  # gathers both halves' input, sums the first
  yield "all-gather", "tensor", ((4 + 2 * again) * layers + 2) * stream * others
  yield "reduce-scatter", "tensor", ((4 + again) * layers + 2) * stream * others
  for (kind, axis), size in trace_of(config, sizes, "tpu").sent.items():
    yield kind, axis, size * tokens / sizes["stage"] / (sizes["tensor"] if axis == "context" else 1)
  if sizes["context"] > 1 and model.attention.context_parallel == "all_to_all":
    query = layers * stream / sizes["tensor"] * model.dims["n"] * model.dims["h"] / model.width
    moved = 2 * query * (1 + model.dims["k"] / model.dims["n"]) * (1 - 1 / sizes["context"])
    yield "all-to-all", "context", (2 + again) * moved
  if sizes["stage"] > 1:
    how = config.pipeline
    ticks = len(make_schedule(how.schedule, sizes["stage"], times, how.chunks).table)
    yield "collective-permute", "stage", 2 * ticks * stream / times / sizes["tensor"]
