"""What to change in a config whose program does not fit."""

import math

from llmjax.core.chips import GIB, Topology
from llmjax.core.config import flat
from llmjax.parallel.mesh import axis_sizes
from llmjax.planning.candidates import of_mesh
from llmjax.planning.estimate import estimate
from llmjax.training.config import Config


def changes(config: Config, chips: Topology, times: float, program: str) -> list[str]:
  """Suggests what takes less memory; of training the fastest settings of the mesh that fit.

  Args:
    config: the experiment.
    chips: what it is to run on.
    times: what it wants, in units of what there is; estimates by formula are scaled alike.
    program: train, prefill or decode.
  Returns:
    Sentences `key=value …: why`.
  """
  sizes = axis_sizes(config.mesh, chips.devices)
  found = (_training if program == "train" else _serving)(config, chips, sizes, times)
  more = math.ceil(times * chips.chips)
  return [*found, f"about {more} chips instead of {chips.chips}, the mesh grown with them"]


def _training(config: Config, chips: Topology, sizes: dict[str, int], times: float) -> list[str]:
  now, own = estimate(config, chips, sizes), flat(config)
  limit = now.memory.peak / times
  found = [
    one.but(**{"loss.chunk": chunk})
    for one in of_mesh(config, chips, sizes, config.mesh.across)
    for chunk in {config.loss.chunk, 128}
  ]
  found = [one for one in found if one.estimate.memory.peak <= limit]
  if not found:
    return ["the mesh: no settings of this one fit by formula, --search tries others"]
  best = min(found, key=lambda one: one.estimate.step_s)
  keys = [f"{key}={new}" for key, new in best.changes.items() if own[key] not in (new, -1)]
  return [
    f"{' '.join(keys)}: {best.estimate.memory.peak / GIB:.1f} GiB by formula instead of "
    f"{now.memory.peak / GIB:.1f}, {best.estimate.step_s:.4g} s a step instead of {now.step_s:.4g}"
  ]


def _serving(config: Config, chips: Topology, sizes: dict[str, int], times: float) -> list[str]:
  rows, found = config.data.batch_size, []
  if rows % (2 * sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0:
    found.append(f"data.batch_size={rows // 2}: half the rows, half the cache")
  found.append(f"model.max_seq_len={config.model.max_seq_len // 2}: half the cache")
  copies = chips.slices if config.mesh.across == "data" else 1
  if sizes["data"] > copies:
    both = sizes["data"] // copies * sizes["tensor"]
    found.append(f"mesh.data={copies} mesh.tensor={both}: {both} devices share weights and heads")
  return found
