"""FLOPs of a compiled program counted in its text, independently of the traces that plans count.

The TPU's compiler writes most products as convolutions, whose windows stand for batches of them;
the multiply-adds that meet a value and no padding are counted.
"""

import math
import re

import numpy as np

from llmjax.core.chips import Chip
from llmjax.parallel.hlo import Op, dims, numbers, walk


def program_flops(hlo_text: str, kernels_s: float, chip: Chip) -> float:
  """Counts products by their shapes, and kernels by the seconds that they take at the chip's peak.

  Every branch of a conditional counts.
  """
  products = sum(product_flops(run.op, run.body) * run.count for run in walk(hlo_text))
  return products + kernels_s * chip.peak("bfloat16") / chip.devices


def product_flops(op: Op, body: dict[str, Op]) -> int:
  """Counts what one execution of a `dot` or a `convolution` multiplies and adds, as two FLOPs.

  Args:
    op: any instruction; of others it is 0, also of fusions, whose parts `walk` yields.
    body: its computation.
  """
  if op.code not in ("dot", "convolution"):
    return 0
  left, right = (dims(body[name].shape) for name in op.operands[:2])
  if op.code == "dot":
    summed = numbers(op.find(r"lhs_contracting_dims={([\d,]*)}"))
    return 2 * math.prod(dims(op.shape)) * math.prod(left[i] for i in summed)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
  inputs, kernel, made = (
    dict(zip(names, sizes, strict=True))
    for names, sizes in zip(labels, (left, right, dims(op.shape)), strict=True)
  )
  places = [label for label in sorted(kernel) if label.isdigit()]
  met = (_met(op, int(at), inputs[at], kernel[at], made[at]) for at in places)
  return 2 * made["b"] * made["f"] * kernel["i"] * math.prod(met)


def _met(op: Op, at: int, given: int, width: int, made: int) -> int:
  """Pairs of a result's place and a window's along dimension `at` that meet a value."""

  def noted(key, default):
    parts = op.find(rf"window={{[^}}]*\b{key}=([\dx_-]+)").split("x")
    return int(parts[at].split("_")[0]) if parts[0] else default

  stride, low = noted("stride", 1), noted("pad", 0)
  holes, step = noted("lhs_dilate", 1), noted("rhs_dilate", 1)
  place = np.arange(made)[:, None] * stride + np.arange(width) * step - low
  return int(((place % holes == 0) & (place >= 0) & (place < given * holes)).sum())
