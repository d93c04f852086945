"""`plan`: what a config needs of a topology; formulas first, then the compiler's own word."""

import dataclasses
import functools
import math
from pathlib import Path

from jax.sharding import AbstractMesh

from llmjax.core.chips import Topology, topology
from llmjax.core.errors import UserError
from llmjax.models.build import count_parameters
from llmjax.models.formulas import filled_share, forward_flops_per_token, seen_share
from llmjax.parallel.collectives import collectives
from llmjax.parallel.mesh import AXES, abstract_mesh
from llmjax.planning.advice import changes
from llmjax.planning.ahead import Compiled, compile_ahead, has_compiler
from llmjax.planning.cost import memory
from llmjax.planning.decode import check_decodes
from llmjax.planning.estimate_from_hlo import estimate_from_hlo
from llmjax.planning.formulas import bill, roofline, serving
from llmjax.planning.traffic import collective_bytes
from llmjax.training.config import Config
from llmjax.training.runnable import check_run, with_vocab


def plan(
  config: Config,
  where: str,
  slices: int = 1,
  price: float | None = None,
  decode: bool = False,
  keep_hlo: str = "",
  keep_executable: str = "",
) -> dict:
  """Plans a run on a topology that need not be at hand.

  Args:
    config: the experiment; without `model.vocab_size` the tokenizer's is taken.
    where: `v5p:4x4x4`, `h100:64`.
    slices: groups of such chips with a slow network between them.
    price: dollars an hour of a chip; by default the list price.
    decode: plan writing text instead: `data.batch_size` rows in a cache of `model.max_seq_len`
      slots.
    keep_hlo: file for the optimized program; "" keeps none.
    keep_executable: file for the compiled step, for `train.executable`; "" keeps none.
  Returns:
    `fits`, `peak_bytes`, `hbm_bytes`, `ideal_step_s`, `bound`, `tokens_per_step` and costs by
    formula. For a TPU whose compiler is installed the first two and costs are by the compiler's
    estimates, and so are `est_step_s`, `mfu`, `compile_s`, `collectives` and `largest_buffers`.
    With `decode` a step is a token of every row, and `prefill` holds the same of the prompts.
  Raises:
    UserError: an unknown topology, a mesh that does not divide it, a program that is refused.
  """
  if decode and keep_executable:
    raise UserError("a run loads a train step: --keep-executable does not go with --decode")
  above_zero("--price", price)
  for path in (keep_hlo, keep_executable):
    if not Path(path).absolute().parent.is_dir():
      raise UserError(f"{path!r}: there is no such folder to keep it in")
  chips = topology(where, slices)
  if price:
    chips = dataclasses.replace(chips, chip=dataclasses.replace(chips.chip, usd_per_hour=price))
  mesh = abstract_mesh(
    config.mesh, chips.devices, chips.slices, "tpu" if chips.chip.sizes else "gpu"
  )
  if decode:
    config = config if config.model.vocab_size else with_vocab(config)
    check_decodes(config, mesh)
  else:
    config = check_run(config, mesh)
  sizes = dict(mesh.shape)
  result = _about(config, chips, sizes) | (_served if decode else _trained)(config, chips, sizes)
  if lacking := _lacking(chips):
    if keep_hlo or keep_executable:
      raise UserError(f"nothing is compiled, so nothing can be kept: {lacking}")
    return result | {"compiler": f"{lacking}: formulas alone"}
  if decode:
    flops = _flops(config, config.model.max_seq_len)
    prompts = _compile_and_read("prefill", config, chips, sizes, flops)
    answer = _compile_and_read("decode", config, chips, sizes, _flops(config, 1), keep_hlo)
    result["prefill"] |= prompts
  else:
    flops = result["model_flops_per_step"]
    answer = _compile_and_read("train", config, chips, sizes, flops, keep_hlo, keep_executable)
  steps = 0 if decode else config.train.steps
  return result | answer | _costs(chips, answer.get("est_step_s"), result["tokens_per_step"], steps)


def above_zero(flag: str, value: float | None):
  """Raises a `UserError` where a number was given and is not a finite one above 0."""
  if value is not None and not 0 < value < math.inf:
    raise UserError(f"{flag}={value} is not a number above 0")


def _lacking(chips: Topology) -> str:
  """Says why there is no compiler to ask; "" if there is one."""
  if not chips.chip.sizes:
    return "there is none for GPUs here"
  return "" if has_compiler() else "pip install 'llmjax[plan]' brings the TPU's"


def _about(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  return {
    "topology": chips.name, "slices": chips.slices, "chips": chips.chips, "mesh": sizes,
    "parameters": count_parameters(config.model),
    "hbm_bytes": _hbm_bytes(chips),
    "usd_per_chip_hour": chips.chip.usd_per_hour,
  }


def _trained(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  bound, held = roofline(config, chips, sizes), memory(config, sizes, chips.chip)
  tokens = config.data.batch_size * config.model.max_seq_len
  return {
    **_fits(chips, held.peak),
    "memory_by_formula": dataclasses.asdict(held),
    "tokens_per_step": tokens,
    "model_flops_per_step": bound.model_s * _peak(config, chips),
    "repeated_flops_per_step": (bound.compute_s - bound.model_s) * _peak(config, chips),
    "sends_by_formula": [dataclasses.asdict(each) for each in collective_bytes(config, sizes)],
    "roofline": dataclasses.asdict(bound),
    "bound": bound.bound,
    "ideal_step_s": bound.step_s,
    "ideal_mfu": bound.mfu,
    **_costs(chips, bound.step_s, tokens, config.train.steps),
  }


def _served(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  rows, length = config.data.batch_size, config.model.max_seq_len
  bound = serving(config.model, chips, rows, length, length)
  return {
    **_fits(chips, bound.device_bytes),
    "tokens_per_step": rows,
    "ideal_step_s": bound.token_s,
    "cache_bytes": bound.cache_bytes,
    "prefill": {"tokens_per_step": rows * length, "ideal_step_s": bound.prefill_s},
    **_costs(chips, bound.token_s, rows),
  }


def _fits(chips: Topology, peak_bytes: float) -> dict:
  return {"fits": peak_bytes <= _hbm_bytes(chips), "peak_bytes": peak_bytes}


def _hbm_bytes(chips: Topology) -> float:
  return chips.chip.hbm_bytes / chips.chip.devices


def _flops(config: Config, tokens: int) -> float:
  """FLOPs of reading so many tokens of every row, forward."""
  each = forward_flops_per_token(config.model, config.model.max_seq_len)
  return config.data.batch_size * tokens * each


def _peak(config: Config, chips: Topology) -> float:
  return chips.chip.peak(config.model.dtype) * chips.chips


def _costs(chips: Topology, step_s: float | None, tokens: int, steps: int = 0) -> dict:
  """What a number of tokens a step comes to, and all steps of a run if there are some.

  None stands for a cost whose rate, dollars or watts, is not published. Nothing is said where the
  step's time is not known.
  """
  if not step_s:
    return {}
  per_billion = bill(chips, 1e9, tokens / step_s)
  run = bill(chips, steps * tokens, tokens / step_s)
  run_costs = {"run_days": run.days, "run_cost_usd": run.usd or None, "run_kwh": run.kwh or None}
  return (run_costs if steps else {}) | {
    "tokens_per_s": tokens / step_s,
    "tokens_per_day": per_billion.tokens_per_day,
    "cost_usd_per_btokens": per_billion.usd or None,
    "cost_usd_per_mtokens": per_billion.usd / 1000 or None,
    "kwh_per_btokens": per_billion.kwh or None,
  }


def _compile_and_read(
  program: str, config: Config, chips: Topology, sizes, flops: float, keep_hlo="",
  keep_executable="",
) -> dict:
  """Compiles a program and reads what the compiler made of it."""
  compiled = compile_ahead(config, chips, program, keep_executable)
  if keep_hlo and compiled.text:
    Path(keep_hlo).write_text(compiled.text)
  answer = {
    "fits": bool(compiled.text),
    "compile_s": compiled.compile_s,
    "cached": compiled.cached,
    "largest_buffers": [each._asdict() for each in compiled.largest],
  }
  if not compiled.text:
    wanted, limit = compiled.wanted_bytes, compiled.limit_bytes
    change = changes(config, chips, wanted / limit, program)
    return answer | {"peak_bytes": wanted, "usable_bytes": limit, "change": change}
  return answer | _read(config, chips, sizes, compiled, flops)


def _read(config: Config, chips: Topology, sizes, compiled: Compiled, flops: float) -> dict:
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  found = collectives(compiled.text, mesh, chips.slices, config.mesh.across)
  seen = functools.partial(seen_share, config.model)
  filled = filled_share(config.model, sizes["expert"]) if config.model.moe.experts else 1.0
  count = estimate_from_hlo(compiled.text, found, chips.chip, seen=seen, filled=filled)
  return {
    "peak_bytes": compiled.memory["peak"],
    "memory": compiled.memory,
    "estimate": dataclasses.asdict(count),
    "est_step_s": count.step_s,
    "mfu": flops / _peak(config, chips) / count.step_s,
    "collectives": [
      {
        "kind": each.kind, "axis": "+".join(each.axes), "count": each.count, "bytes": each.bytes,
        "overlapped": each.overlapped,
      }
      for each in found
    ],
  }
