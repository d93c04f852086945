"""What to change in a config whose program does not fit: keys with values, the least harm first."""

import math
from collections.abc import Iterator

from llmjax.core.chips import GIB, Topology
from llmjax.core.config import override
from llmjax.parallel.mesh import axis_sizes
from llmjax.planning.cost import memory
from llmjax.training.config import Config


def changes(config: Config, chips: Topology, times: float, program: str) -> list[str]:
  """Lists what would take less memory; of training, by how much, and nothing that would not.

  Args:
    config: the experiment.
    chips: what it is to run on.
    times: what it wants, in units of what there is.
    program: train, prefill or decode.
  Returns:
    Sentences `key=value …: why`, of keys that are not so already.
  """
  sizes = axis_sizes(config.mesh, chips.devices)
  copies = chips.slices if config.mesh.across == "data" else 1
  said = []
  for keys, why in (_trained if program == "train" else _served)(config, sizes, copies):
    if program != "train":
      said.append(f"{keys}: {why}")
    elif (then := _peak(_changed(config, keys), chips)) < (now := _peak(config, chips)):
      said.append(f"{keys}: {why}; {then / GIB:.1f} GiB by formula instead of {now / GIB:.1f}")
  more = math.ceil(times * chips.chips)
  return [*said, f"about {more} chips instead of {chips.chips}, the mesh grown with them"]


def _changed(config: Config, keys: str) -> Config:
  return override(config, [f"--config.{key}" for key in keys.split()])


def _peak(config: Config, chips: Topology) -> float:
  return memory(config, axis_sizes(config.mesh, chips.devices), chips.chip).peak


def _trained(config: Config, sizes: dict[str, int], copies: int) -> Iterator[tuple[str, str]]:
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"]
  parts = config.train.grad_accum_steps
  rows = config.data.batch_size // parts // ways
  if sizes["fsdp"] > 1 and config.train.zero_stage < 3:
    yield "train.zero_stage=3", "fsdp then cuts weights and gradients too"
  if sizes["data"] > copies:
    both = sizes["data"] // copies * sizes["fsdp"]
    yield f"mesh.data={copies} mesh.fsdp={both}", f"{both} devices share weights and moments"
  if config.model.remat != "full":
    yield "model.remat=full", "layers keep their inputs alone, and are computed once more"
  if rows > 1:
    fewer = next(n for n in range(2, rows + 1) if rows % n == 0)
    why = f"a device has {rows // fewer} of a micro-batch's rows instead of {rows}"
    yield f"train.grad_accum_steps={parts * fewer}", why
  if config.loss.chunk == 0 or config.loss.chunk > 128:
    yield "loss.chunk=128", "logits of so many positions of a row exist at a time"


def _served(config: Config, sizes: dict[str, int], copies: int) -> Iterator[tuple[str, str]]:
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"]
  rows = config.data.batch_size
  if rows // ways > 1 and rows % (2 * ways) == 0:
    yield f"data.batch_size={rows // 2}", "half the rows, half the cache"
  yield f"model.max_seq_len={config.model.max_seq_len // 2}", "half the cache"
  if sizes["data"] > copies:
    both = sizes["data"] // copies * sizes["tensor"]
    yield f"mesh.data={copies} mesh.tensor={both}", f"{both} devices share weights and heads"
