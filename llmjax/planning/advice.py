"""What to change in a config whose program does not fit."""

import math

from llmjax.core.chips import Topology
from llmjax.core.config import flat
from llmjax.parallel.collectives import show_bytes
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
  more = math.ceil(times * chips.chips)
  more = f"about {more} chips instead of {chips.chips}, the mesh grown with them"
  sizes, own = axis_sizes(config.mesh, chips.devices), flat(config)
  if program != "train":
    fewer = [f"model.max_seq_len={config.model.max_seq_len // 2}: half the cache"]
    if config.data.batch_size % (2 * sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0:
      fewer.append(f"data.batch_size={config.data.batch_size // 2}: half the cache")
    if (copies := sizes["data"] // chips.slices) > 1 and sizes["data"] % chips.slices == 0:
      keys = f"mesh.data={chips.slices} mesh.tensor={copies * sizes['tensor']}"
      fewer.append(f"{keys}: {copies} times as many devices share weights and heads")
    return [*fewer, more]
  now = estimate(config, chips, sizes)
  found = [
    one.but(**{"loss.chunk": chunk})
    for one in of_mesh(config, chips, sizes, config.mesh.across)
    for chunk in {config.loss.chunk, 128}
  ]
  found = [one for one in found if one.peak_bytes <= now.memory.peak / times]
  if not found:
    return ["the mesh: no settings of this one fit by formula, --search tries others", more]
  best = min(found, key=lambda one: one.step_s)
  keys = [f"{key}={new}" for key, new in best.changes.items() if own[key] not in (new, -1)]
  peak, before = show_bytes(best.peak_bytes), show_bytes(now.memory.peak)
  seconds = f"{best.step_s:.4g} s a step instead of {now.step_s:.4g}"
  return [f"{' '.join(keys)}: {peak} by formula instead of {before}, {seconds}", more]
