"""`plan`: what a config needs of a topology; formulas first, then the compiler's own word."""

import dataclasses
import functools
import math
from pathlib import Path

from jax.sharding import AbstractMesh

from llmjax.core.chips import Topology
from llmjax.core.config import frozen
from llmjax.core.errors import UserError
from llmjax.models.build import count_parameters
from llmjax.models.formulas import filled_share, forward_flops_per_token, seen_share
from llmjax.parallel.collectives import collectives
from llmjax.parallel.mesh import AXES, abstract_mesh
from llmjax.planning.advice import changes
from llmjax.planning.compiler import compile_ahead, has_compiler
from llmjax.planning.decode import check_decodes
from llmjax.planning.estimate import estimate
from llmjax.planning.estimate_from_hlo import estimate_from_hlo
from llmjax.planning.formulas import costs, priced, serving
from llmjax.training.config import Config
from llmjax.training.runnable import check_run, with_vocab


def plan(
  config,
  where: str,
  slices: int = 1,
  price: float | None = None,
  decode: bool = False,
  keep_hlo: str = "",
  keep_executable: str = "",
) -> dict:
  """Plans a run on a topology that need not be at hand.

  Args:
    config: the experiment, frozen or editable; without `model.vocab_size` the tokenizer's is taken.
    where: `v5p:4x4x4`, `h100:64`.
    slices: groups of such chips with a slow network between them.
    price: dollars an hour of a chip; by default the list price.
    decode: plan writing text instead: `data.batch_size` rows in a cache of `model.max_seq_len`
      slots.
    keep_hlo: file for the optimized program; "" keeps none.
    keep_executable: file for the compiled step, for `train.executable`; "" keeps none.
  Returns:
    `fits`, `peak_bytes`, `hbm_bytes`, `predicted_s`, `ideal_step_s`, `bound`, `tokens_per_step` and
    costs by formula. For a TPU whose compiler is installed the first two and costs are by the
    compiler's estimates, and so are `est_step_s`, `mfu`, `compile_s`, `collectives` and
    `largest_buffers`. With `decode` a step is a token of every row, and `prefill` holds the same of
    the prompts.
  Raises:
    UserError: an unknown topology, a mesh that does not divide it, a program that is refused.
  """
  config = frozen(config, Config)
  if decode and keep_executable:
    raise UserError("a run loads a train step: --keep-executable does not go with --decode")
  above_zero("--price", price)
  for path in (keep_hlo, keep_executable):
    if not Path(path).absolute().parent.is_dir():
      raise UserError(f"{path!r}: there is no such folder to keep it in")
  chips = priced(where, slices, price)
  mesh = abstract_mesh(
    config.mesh, chips.devices, chips.slices, "tpu" if chips.chip.sizes else "gpu"
  )
  if decode:
    config = config if config.model.vocab_size else with_vocab(config)
    check_decodes(config, mesh)
  else:
    config = check_run(config, mesh)
  sizes = dict(mesh.shape)
  result = {
    "topology": chips.name, "slices": chips.slices, "chips": chips.chips, "mesh": sizes,
    "parameters": count_parameters(config.model), "usd_per_chip_hour": chips.chip.usd_per_hour,
  }
  result |= (_serving if decode else _training)(config, chips, sizes)
  if reason := _lacks_compiler(chips):
    if keep_hlo or keep_executable:
      raise UserError(f"nothing is compiled, so nothing can be kept: {reason}")
    return result | {"compiler": f"{reason}: formulas alone"}
  compiled = functools.partial(_compiled, config, chips, sizes)
  if decode:
    flops = forward_flops_per_token(config.model, config.model.max_seq_len) * config.data.batch_size
    result["prefill"] |= compiled("prefill", flops * config.model.max_seq_len)
    result |= compiled("decode", flops, keep_hlo)
  else:
    result |= compiled("train", result["model_flops_per_step"], keep_hlo, keep_executable)
  return result | _costs(config, chips, result, result.get("est_step_s"))


def above_zero(flag: str, value: float | None):
  """Raises a `UserError` where a number was given and is not a finite one above 0."""
  if value is not None and not 0 < value < math.inf:
    raise UserError(f"{flag}={value} is not a number above 0")


def _lacks_compiler(chips: Topology) -> str:
  """Says why there is no compiler to ask; "" if there is one."""
  if not chips.chip.sizes:
    return "there is none for GPUs here"
  return "" if has_compiler() else ".venv/bin/pip install -e '.[plan]' brings the TPU's"


def _training(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  found, peak = estimate(config, chips, sizes), _peak(config, chips)
  result = {
    **_fits(chips, found.memory.peak),
    "tokens_per_step": config.data.batch_size * config.model.max_seq_len,
    "model_flops_per_step": found.model_s * peak,
    "repeated_flops_per_step": (found.roofline["compute_s"] - found.model_s) * peak,
    "memory_by_formula": dataclasses.asdict(found.memory),
    "sends_by_formula": [
      {"kind": each.kind, "axis": "+".join(each.axes), "bytes": each.bytes} for each in found.sends
    ],
    "predicted_s": found.step_s,
    "predicted_mfu": found.mfu,
    "roofline": found.roofline,
    "bound": max(found.roofline, key=found.roofline.get).removesuffix("_s"),
    "ideal_step_s": found.least_s,
    "ideal_mfu": found.model_s / found.least_s,
  }
  return result | _costs(config, chips, result, found.step_s)


def _serving(config: Config, chips: Topology, sizes: dict[str, int]) -> dict:
  rows, length = config.data.batch_size, config.model.max_seq_len
  bound = serving(config.model, chips, rows, length, length)
  result = {
    **_fits(chips, bound.device_bytes),
    "tokens_per_step": rows,
    "ideal_step_s": bound.token_s,
    "cache_bytes": bound.cache_bytes,
    "prefill": {"tokens_per_step": rows * length, "ideal_step_s": bound.prefill_s},
  }
  return result | _costs(config, chips, result, bound.token_s)


def _fits(chips: Topology, peak_bytes: float) -> dict:
  hbm_bytes = chips.chip.hbm_bytes / chips.chip.devices
  return {"fits": peak_bytes <= hbm_bytes, "peak_bytes": peak_bytes, "hbm_bytes": hbm_bytes}


def _peak(config: Config, chips: Topology) -> float:
  return chips.chip.peak(config.model.dtype) * chips.chips


def _costs(config: Config, chips: Topology, result: dict, step_s: float | None) -> dict:
  """What tokens cost, and in training the whole run; nothing where a step's time is not known."""
  if not step_s:
    return {}
  tokens = result["tokens_per_step"]
  steps = 0 if "prefill" in result else config.train.steps
  return costs(chips, tokens / step_s, steps * tokens)


def _compiled(
  config: Config, chips: Topology, sizes, program: str, flops: float, keep_hlo="",
  keep_executable="",
) -> dict:
  """Compiles a program and reads what the compiler made of it."""
  answer, text = compile_ahead(config, chips, program, keep_executable)
  if not text:
    times = answer["peak_bytes"] / answer["usable_bytes"]
    return answer | {"fits": False, "change": changes(config, chips, times, program)}
  if keep_hlo:
    Path(keep_hlo).write_text(text)
  mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
  found = collectives(text, mesh, chips.slices, config.mesh.across)
  seen = functools.partial(seen_share, config.model)
  filled = filled_share(config.model, sizes["expert"]) if config.model.moe.experts else 1.0
  time = estimate_from_hlo(text, found, chips.chip, seen=seen, filled=filled)
  return answer | {
    "fits": True,
    "peak_bytes": answer["memory"]["peak"],
    "estimate": dataclasses.asdict(time),
    "est_step_s": time.step_s,
    "mfu": flops / _peak(config, chips) / time.step_s,
    "collectives": [
      {
        "kind": each.kind, "axis": "+".join(each.axes), "count": each.count, "bytes": each.bytes,
        "overlapped": each.overlapped,
      }
      for each in found
    ],
  }
