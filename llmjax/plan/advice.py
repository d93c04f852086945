"""What to change in a config whose program does not fit: keys with values, the least harm first."""

import math

from llmjax.train.config import Config


def changes(
  config: Config, sizes: dict[str, int], slices: int, times: float, program: str
) -> list[str]:
  """Lists what would take less memory.

  Args:
    config: the experiment.
    sizes: of every mesh axis.
    slices: which `data` or `stage` must still cross.
    times: what it wants, in units of what there is.
    program: train, prefill or decode.
  Returns:
    Sentences `key=value …: why`, of keys that are not so already.
  """
  copies = slices if config.mesh.across == "data" else 1
  own = (_trained if program == "train" else _served)(config, sizes, copies)
  chips = math.prod(sizes.values())
  more = f"about {math.ceil(times * chips)} chips instead of {chips}, the mesh grown with them"
  return [*own, more]


def _trained(config: Config, sizes: dict[str, int], copies: int):
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"]
  parts = config.train.accumulation
  rows = config.data.batch_size // parts // ways
  if sizes["fsdp"] > 1 and config.train.zero < 3:
    yield "train.zero=3: fsdp then cuts weights and gradients too"
  if sizes["data"] > copies:
    both = sizes["data"] // copies * sizes["fsdp"]
    yield f"mesh.data={copies} mesh.fsdp={both}: {both} devices share weights and optimizer state"
  if config.model.remat != "full":
    yield "model.remat=full: layers keep their inputs alone, and are computed once more"
  if rows > 1:
    few = next(n for n in range(2, rows + 1) if rows % n == 0)
    yield (
      f"train.accumulation={parts * few}: {rows // few} rows of a micro-batch on a device "
      f"instead of {rows}"
    )
  if config.loss.chunk == 0 or config.loss.chunk > 128:
    yield "loss.chunk=128: logits of so many positions of a row exist at a time"
  if rows <= 1 and sizes["tensor"] == 1:
    yield "mesh.tensor or mesh.context above 1: a device has one row already"


def _served(config: Config, sizes: dict[str, int], copies: int):
  ways = sizes["data"] * sizes["fsdp"] * sizes["expert"]
  rows = config.data.batch_size
  if rows // ways > 1:
    yield f"data.batch_size={rows // 2}: half the rows, half the cache"
  yield f"model.context={config.model.context // 2}: half the cache"
  if sizes["data"] > copies:
    both = sizes["data"] // copies * sizes["tensor"]
    yield f"mesh.data={copies} mesh.tensor={both}: {both} devices share weights and heads"
