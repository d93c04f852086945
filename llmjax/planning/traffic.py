"""What a training step sends along each mesh axis, by formula.

The compiled program is held to the same formulas (tests/multidevice/test_budget.py). Bytes are what
one device passes on, not what is whole there: of a gathered array the others' parts.
"""

import dataclasses

from llmjax.models.build import count_parameters
from llmjax.models.config import ModelConfig
from llmjax.parallel.schedules import make_schedule
from llmjax.training.config import Config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}


@dataclasses.dataclass(frozen=True)
class CollectiveBytes:
  """Bytes that a device passes on in one step.

  Attributes:
    kind: of collective.
    axis: of the mesh.
    bytes: of all its executions.
  """

  kind: str
  axis: str
  bytes: float


def traffic(config: Config, sizes: dict[str, int]) -> list[CollectiveBytes]:
  """Lists what a step sends.

  Args:
    config: the experiment; `train.zero_stage`, `pipeline` and `model.remat` count.
    sizes: of every mesh axis.
  Returns:
    One `Sent` for each kind and axis.
  """
  return [
    CollectiveBytes(kind, axis, size)
    for kind, axis, size in (
      *_weights(config, sizes), *_streams(config, sizes), *_rows(config, sizes),
    )
    if sizes[axis] > 1
  ]


def _weights(config, sizes):
  """Weights gathered in the compute dtype, gradients summed, both for each micro-batch.

  Layers' weights are gathered on the way forward and on the way back (of a pipeline's stage, which
  goes forward twice, three times), the head's once. Of the token table rows are exchanged, there
  and, as gradients, back; nobody gathers it.
  """
  model, train = config.model, config.train
  parts, low = train.grad_accum_steps, DTYPE_BYTES[model.dtype] / 4
  layers, table = _held(model, sizes)
  rest = table * (1 if model.tie_embeddings else 2)  # token table and head
  part = (sizes["fsdp"] - 1) / sizes["fsdp"]
  if train.zero_stage == 3:
    times = 2 if sizes["stage"] == 1 else 3
    yield "all-gather", "fsdp", parts * low * (times * layers + table) * part
    yield "all-to-all", "fsdp", 2 * parts * _stream(config, sizes) / sizes["tensor"] * part
    sums = DTYPE_BYTES[train.grad_reduce_dtype] / 4
    yield "reduce-scatter", "fsdp", parts * sums * (layers + table) * part
  else:
    yield "all-gather", "fsdp", (layers + rest) * part
    sums, times = ("reduce-scatter", 1) if train.zero_stage == 2 else ("all-reduce", 2)
    yield sums, "fsdp", parts * times * (layers + rest) * part
  experts = expert_bytes(model) / (sizes["stage"] * sizes["tensor"] * sizes["expert"])
  cut = sizes["fsdp"] if train.zero_stage > 1 else 1
  for axis, whole, times in (
    ("data", layers + rest, parts), ("context", layers + rest, parts),
    ("expert", layers + rest - experts, parts), ("stage", rest, 1),
  ):
    ways = sizes[axis]
    yield "all-reduce", axis, 2 * times * max(0, whole / cut) * (ways - 1) / ways


def _held(model: ModelConfig, sizes) -> tuple[float, float]:
  """fp32 bytes on a device, whole over `fsdp`: (of layers, of a table of tokens)."""
  table = 4 * model.vocab_size * model.width
  layers = 4 * count_parameters(model) - table * (1 if model.tie_embeddings else 2)
  experts = expert_bytes(model)
  layers += experts / sizes["expert"] - experts
  return layers / (sizes["stage"] * sizes["tensor"]), table / sizes["tensor"]


def _stream(config, sizes) -> float:
  """Bytes of a micro-batch's residual stream on a device, whole over `tensor`."""
  tokens = _local_tokens(config, sizes) / config.train.grad_accum_steps
  return tokens * config.model.width * DTYPE_BYTES[config.model.dtype]


def _streams(config, sizes):
  """The residual stream between tensor's halves and pipeline's stages, keys to other positions."""
  model, parts = config.model, config.train.grad_accum_steps
  stream = parts * _stream(config, sizes)
  part = (sizes["tensor"] - 1) / sizes["tensor"]
  layers = model.layers / sizes["stage"]
  again = model.remat != "none" or sizes["stage"] > 1  # gathers both halves' input, sums the first
  yield "all-gather", "tensor", ((4 + 2 * again) * layers + 2) * stream * part
  yield "reduce-scatter", "tensor", ((4 + again) * layers + 2) * stream * part
  yield from _keys(config, sizes, layers * stream / sizes["tensor"], again)
  if sizes["stage"] > 1:
    how = config.pipeline
    ticks = len(make_schedule(how.schedule, sizes["stage"], parts, how.chunks).table)
    yield "collective-permute", "stage", 2 * ticks * stream / parts / sizes["tensor"]


def _keys(config, sizes, stream: float, again: bool):
  """What attention sends where positions are cut; `stream` is of all layers."""
  model, ways = config.model, sizes["context"]
  query = stream * model.dims["n"] * model.dims["h"] / model.width
  pair = 2 * query * model.dims["k"] / model.dims["n"]  # keys and values
  moved = (2 * query + pair) * (ways - 1) / ways  # with queries and the result
  if model.attention.context_parallel == "all_to_all":
    yield "all-to-all", "context", (2 + again) * moved
  elif model.attention.context_parallel == "gather" or sizes["stage"] > 1:
    yield "all-gather", "context", (1 + again) * pair * (ways - 1)
    yield "reduce-scatter", "context", pair * (ways - 1)
  else:  # halves change places before and after; back, gradients go round beside them in fp32
    lap = ways * pair
    back = lap * (1 + 4 / DTYPE_BYTES[model.dtype]) + moved
    yield "collective-permute", "context", (1 + again) * (lap + moved) + back


def _rows(config, sizes):
  """Rows to their experts and back, both ways, where load is even."""
  model = config.model
  if model.moe.experts:
    rows = model.moe.top_k * config.train.grad_accum_steps * _stream(config, sizes)
    layers = (model.layers - model.moe.first_k_dense) / sizes["stage"]
    part = (sizes["expert"] - 1) / sizes["expert"]
    again = 2 * (model.remat != "none" or sizes["stage"] > 1)
    yield "all-to-all", "expert", (4 + again) * layers * rows * part


def _local_tokens(config, sizes) -> float:
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
  return config.data.batch_size * config.model.max_seq_len / ways


def expert_bytes(model: ModelConfig) -> int:
  """fp32 bytes of all routed experts' weights."""
  moe = model.moe
  if not moe.experts:
    return 0
  inputs = 2 if "glu" in model.activation else 1
  one = (inputs + 1) * model.width * (moe.width or model.mlp_width)
  return 4 * one * moe.experts * (model.layers - moe.first_k_dense)
