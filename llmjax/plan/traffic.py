"""What a training step sends along each mesh axis, by formula.

The compiled program is held to the same formulas (tests/multidevice/test_budget.py). Bytes are what
one device passes on, not what is whole there: of a gathered array the others' parts.
"""

import dataclasses

from llmjax.models.build import count_parameters
from llmjax.models.config import ModelConfig
from llmjax.parallel.schedules import make_schedule
from llmjax.train.config import Config


@dataclasses.dataclass(frozen=True)
class Sent:
  """Bytes that a device passes on in one step.

  Attributes:
    kind: of collective.
    axis: of the mesh.
    bytes: of all its executions.
  """

  kind: str
  axis: str
  bytes: float


def traffic(config: Config, sizes: dict[str, int]) -> list[Sent]:
  """Lists what a step sends.

  Args:
    config: the experiment; `train.zero`, `pipeline` and `model.remat` count.
    sizes: of every mesh axis.
  Returns:
    One `Sent` for each kind and axis.
  """
  return [
    Sent(kind, axis, size)
    for kind, axis, size in (
      *_weights(config, sizes), *_streams(config, sizes), *_rows(config, sizes),
    )
    if sizes[axis] > 1
  ]


def _weights(config, sizes):
  """Weights gathered, gradients summed."""
  model = config.model
  held = count_parameters(model) * 4 / (sizes["stage"] * sizes["tensor"])
  experts = expert_bytes(model) / (sizes["stage"] * sizes["tensor"])
  held += experts / sizes["expert"] - experts
  part = (sizes["fsdp"] - 1) / sizes["fsdp"]
  gathers = 2 if config.train.zero == 3 else 1
  yield "all-gather", "fsdp", gathers * held * part
  yield "reduce-scatter", "fsdp", held * part
  rest = held / sizes["fsdp"]
  for axis, whole in (("data", rest), ("context", rest), ("expert", rest - experts)):
    yield "all-reduce", axis, 2 * max(0, whole) * (sizes[axis] - 1) / sizes[axis]


def _streams(config, sizes):
  """The residual stream between tensor's halves and pipeline's stages, keys around the ring."""
  model = config.model
  stream = _local_tokens(config, sizes) * model.width * 2
  part = (sizes["tensor"] - 1) / sizes["tensor"]
  layers = model.layers / sizes["stage"]
  yield "all-gather", "tensor", (4 * layers + 2) * stream * part
  yield "reduce-scatter", "tensor", (4 * layers + 2) * stream * part
  keys = 2 * stream * model.dims["k"] / model.dims["n"] / sizes["tensor"]
  yield "collective-permute", "context", 3 * layers * keys * (sizes["context"] - 1)
  if sizes["stage"] > 1:
    parts = config.train.accumulation
    how = config.pipeline
    ticks = len(make_schedule(how.schedule, sizes["stage"], parts, how.chunks).table)
    yield "collective-permute", "stage", 2 * ticks * stream / parts


def _rows(config, sizes):
  """Rows to their experts and back, both ways, where load is even."""
  model = config.model
  if model.moe.experts:
    rows = _local_tokens(config, sizes) * model.moe.top_k * model.width * 2
    layers = (model.layers - model.moe.dense_first) / sizes["stage"]
    part = (sizes["expert"] - 1) / sizes["expert"]
    yield "all-to-all", "expert", 4 * layers * rows * part


def _local_tokens(config, sizes) -> float:
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
  return config.data.batch_size * config.model.context / ways


def expert_bytes(model: ModelConfig) -> int:
  """fp32 bytes of all routed experts' weights."""
  moe = model.moe
  if not moe.experts:
    return 0
  inputs = 2 if "glu" in model.activation else 1
  one = (inputs + 1) * model.width * (moe.width or model.mlp_width)
  return 4 * one * moe.experts * (model.layers - moe.dense_first)
