"""`plan`: what a config needs of a topology; formulas first, then the compiler's own word."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

from llmjax.models.build import count_parameters
from llmjax.models.formulas import filled_share, seen_share
from llmjax.parallel.collectives import collectives
from llmjax.parallel.mesh import AXES, axis_sizes
from llmjax.plan.ahead import Compiled, compile_ahead
from llmjax.plan.chips import Topology, topology
from llmjax.plan.formulas import DAY_S, HOUR_S, rent_usd, roofline
from llmjax.plan.recount import recount
from llmjax.train.config import Config


def plan(config: Config, where: str, slices: int = 1, keep_hlo: str = "") -> dict:
  """Plans a run on a topology that need not be at hand.

  Args:
    config: the experiment; without `model.vocab_size` the tokenizer's is taken.
    where: `v5p:4x4x4`, `h100:64`.
    slices: groups of such chips with a slow network between them.
    keep_hlo: file for the optimized program; "" keeps none.
  Returns:
    `ideal_step_s`, `bound`, `tokens_per_step` and costs by formula; for a TPU whose compiler is
    installed also `fits`, `peak_bytes`, `hbm_bytes`, `est_step_s`, `mfu`, `compile_s`,
    `collectives` and `largest_buffers`, all of them the compiler's estimates.
  Raises:
    UserError: an unknown topology, a mesh that does not divide it, a program that is refused.
  """
  chips = topology(where, slices)
  config = _with_vocab(config)
  sizes = axis_sizes(config.mesh, chips.devices)
  result = _by_formula(config, chips, sizes)
  if not chips.chip.sizes:
    return result | {"compiler": "there is none for GPUs here: formulas alone"}
  if importlib.util.find_spec("libtpu") is None:
    return result | {"compiler": "pip install 'llmjax[plan]' brings the TPU's: formulas alone"}
  compiled = compile_ahead(config, chips)
  if keep_hlo and compiled.text:
    Path(keep_hlo).write_text(compiled.text)
  return result | _by_compiler(config, chips, sizes, compiled, result["model_flops_per_step"])


def _with_vocab(config: Config) -> Config:
  size = config.model.vocab_size or config.tokenizer.vocab_size
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _by_formula(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  line = roofline(config, chips, sizes)
  tokens = config.data.batch_size * config.model.context
  rate = chips.chip.peak(config.model.dtype) * chips.chips
  return {
    "topology": chips.name, "slices": chips.slices, "chips": chips.chips, "mesh": sizes,
    "parameters": count_parameters(config.model),
    "tokens_per_step": tokens,
    "model_flops_per_step": line.model_s * rate,
    "roofline": dataclasses.asdict(line),
    "bound": line.bound,
    "ideal_step_s": line.step_s,
    **_costs(chips, line.step_s, tokens),
  }


def _costs(chips: Topology, step_s: float, tokens: int) -> dict:
  hours_per_btokens = 1e9 / tokens * step_s / HOUR_S
  return {
    "tokens_per_day": tokens / step_s * DAY_S,
    "cost_usd_per_btokens": rent_usd(chips.chip, chips.chips, hours_per_btokens),
    "kwh_per_btokens": chips.chip.watts * chips.chips * hours_per_btokens / 1000,
  }


def _by_compiler(config, chips: Topology, sizes, compiled: Compiled, flops: float) -> dict:
  hbm = chips.chip.hbm_bytes / chips.chip.devices
  said = {"compile_s": compiled.compile_s, "hbm_bytes": hbm}
  if not compiled.text:
    return said | {
      "fits": False, "peak_bytes": compiled.wanted_bytes, "largest_buffers": compiled.largest,
      "change": "more chips, model.remat=full, a smaller data.batch_size or train.accumulation",
    }
  mesh = _mesh(sizes)
  found = collectives(compiled.text, mesh, chips.slices, config.mesh.across)
  seen = functools.partial(seen_share, config.model)
  filled = filled_share(config.model, sizes["expert"]) if config.model.moe.experts else 1.0
  count = recount(compiled.text, found, chips.chip, seen=seen, filled=filled)
  step_s = count.step_s
  peak = compiled.memory["peak"]
  return said | {
    "fits": peak <= hbm,
    "peak_bytes": peak,
    "memory": compiled.memory,
    "recount": dataclasses.asdict(count),
    "est_step_s": step_s,
    "mfu": flops / (chips.chip.peak(config.model.dtype) * chips.chips) / step_s,
    "collectives": [
      {"kind": one.kind, "axis": "+".join(one.axes), "count": one.count, "bytes": one.bytes}
      for one in found
    ],
    "largest_buffers": compiled.largest,
    **_costs(chips, step_s, config.data.batch_size * config.model.context),
  }


def _mesh(sizes: dict[str, int]):
  from jax.sharding import AbstractMesh

  return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
