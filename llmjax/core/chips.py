"""Accelerators: each chip's peak rates (the makers' dense ones), memory, links (one way) and list
price on demand, which `--price` of `llmjax plan` overrides; every row names its source."""

import dataclasses
import math
import re

from llmjax.core.errors import UserError

GB, TB, TERA = 1e9, 1e12, 1e12
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator chip.

  Attributes:
    name: as in a topology, `v5p` of `v5p:4x4x4`.
    flops: peak FLOP/s by dtype; a dtype that is missing runs at bfloat16's rate.
    hbm_bytes: memory.
    hbm_rate: bytes/s of memory.
    links: to other chips of its slice or node; of a torus two for each dimension.
    link_rate: bytes/s of one link, one way.
    dcn_rate: bytes/s out of a slice or node, for each chip.
    usd_per_hour: list price on demand; 0 where none is published.
    watts: of the chip at work, 0 where none is published.
    hosts: chips of one host, or node.
    sizes: chips along each dimension of the largest slice; () for GPUs, which count chips only.
    clock_hz: of its cores, for the compiler's estimated cycles; 0 where unknown. The peak divided
      by what a device multiplies in a cycle: 4 arrays of 128 × 128 (v5p: 8) or of 256 × 256 (v6e,
      tpu7x). At it the compiler puts its best product of 2k to 16k a side at 98 % of the peak on
      v5e and v5p, 97 % on v4, 89 % on v6e and 93 % on tpu7x.
    source: where the figures are from.
    devices: that JAX sees in one chip.
    kinds: pattern of the `device_kind`s that JAX calls it by.
  """

  name: str
  flops: dict
  hbm_bytes: float
  hbm_rate: float
  links: int
  link_rate: float
  dcn_rate: float
  usd_per_hour: float
  watts: float
  hosts: int
  sizes: tuple
  clock_hz: float
  source: str
  devices: int = 1
  kinds: str = ""

  def peak(self, dtype: str) -> float:
    """Peak FLOP/s in a dtype."""
    return self.flops.get(dtype, self.flops["bfloat16"])


# Peaks and memory: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links and network a chip:
# Austin et al. 2025, "How to Scale Your Model", ch. 2; prices: cloud.google.com/tpu/pricing (us).
_GOOGLE = "cloud.google.com/tpu/docs and /tpu/pricing; links: Austin et al. 2025, ch. 2"
_ROWS = (
  Chip(
    "v4", {"bfloat16": 275 * TERA, "int8": 275 * TERA}, 32 * GIB, 1.2 * TB, 6, 45 * GB, 6.25 * GB,
    3.22, 192, 4, (16, 16, 16), 1.05e9, _GOOGLE + "; watts: Jouppi et al. 2023, arXiv:2304.01433",
    devices=2, kinds="TPU v4",
  ),
  Chip(
    "v5e", {"bfloat16": 197 * TERA, "int8": 393 * TERA}, 16 * GIB, 819 * GB, 4, 45 * GB,
    3.125 * GB, 1.20, 0, 8, (16, 16), 1.5e9, _GOOGLE, kinds="TPU v5( lite|e)",
  ),
  Chip(
    "v5p", {"bfloat16": 459 * TERA, "int8": 918 * TERA}, 95 * GIB, 2765 * GB, 6, 90 * GB,
    6.25 * GB, 4.20, 0, 4, (16, 20, 28), 1.75e9, _GOOGLE, kinds="TPU v5p?",
  ),
  Chip(
    "v6e", {"bfloat16": 918 * TERA, "int8": 1836 * TERA}, 32 * GIB, 1640 * GB, 4, 90 * GB,
    12.5 * GB, 2.70, 0, 8, (16, 16), 1.75e9, _GOOGLE, kinds="TPU v6( lite|e)",
  ),
  Chip(
    "tpu7x", {"bfloat16": 2307 * TERA, "float8": 4614 * TERA}, 192 * GIB, 7380 * GB, 6, 100 * GB,
    12.5 * GB, 0, 0, 4, (16, 24, 24), 2.2e9, "docs.cloud.google.com/tpu/docs/tpu7x; no list price",
    devices=2, kinds="TPU7x",
  ),
  Chip(
    "a100", {"bfloat16": 312 * TERA, "int8": 624 * TERA}, 80 * GB, 2039 * GB, 1, 300 * GB,
    25 * GB, 2.00, 400, 8, (), 0.0, "NVIDIA A100 80GB SXM data sheet; a round market price",
    kinds="NVIDIA A100.*",
  ),
  Chip(
    "h100", {"bfloat16": 989 * TERA, "float8": 1979 * TERA, "int8": 1979 * TERA}, 80 * GB,
    3350 * GB, 1, 450 * GB, 50 * GB, 3.00, 700, 8, (), 0.0,
    "NVIDIA H100 SXM data sheet; a round market price", kinds="NVIDIA H100 80GB HBM3",
  ),
  Chip(
    "h200", {"bfloat16": 989 * TERA, "float8": 1979 * TERA, "int8": 1979 * TERA}, 141 * GB,
    4800 * GB, 1, 450 * GB, 50 * GB, 3.80, 700, 8, (), 0.0,
    "NVIDIA H200 SXM data sheet; a round market price", kinds="NVIDIA H200",
  ),
  Chip(
    "b200", {"bfloat16": 2250 * TERA, "float8": 4500 * TERA, "int8": 4500 * TERA}, 180 * GB,
    7700 * GB, 1, 900 * GB, 50 * GB, 5.00, 1000, 8, (), 0.0,
    "NVIDIA DGX B200 data sheet, an eighth; a round market price", kinds="NVIDIA B200",
  ),
)
CHIPS = {chip.name: chip for chip in _ROWS}


def chip_of(device_kind: str) -> Chip | None:
  """Finds the chip that JAX calls `TPU v5 lite` or `NVIDIA H200`; None where no row is of it."""
  return next((chip for chip in _ROWS if re.fullmatch(chip.kinds, device_kind)), None)


# Slices that are rented: of flat tori all, of cubes those within one of 4x4x4, of which larger ones
# are built (docs.cloud.google.com/tpu/docs, each chip's page). The compiler would take others.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_WITHIN = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_EDGE = 4


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that a run would use.

  Attributes:
    chip: their kind.
    shape: chips along each dimension of a slice; one number for GPUs.
    slices: how many such groups, with the slow network between them.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Devices that JAX sees."""
    return self.chips * self.chip.devices

  @property
  def name(self) -> str:
    """As the compiler takes it: `v5p:4x4x4`, of one slice."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology(text: str, slices: int = 1) -> Topology:
  """Reads `v5p:4x4x4` or `h100:64`.

  Raises:
    UserError: an unknown chip, or a shape that it is not built in.
  """
  name, _, shape = text.partition(":")
  if name not in CHIPS:
    raise UserError(f"unknown chip {name!r} in {text!r}; known: {', '.join(sorted(CHIPS))}")
  chip = CHIPS[name]
  numbers = shape.split("x")
  built = all(re.fullmatch(r"[1-9]\d{0,5}", one) for one in numbers)
  if not built or not _is_built(chip, tuple(map(int, numbers))):
    raise UserError(f"no {name} is built as {shape!r}: {name} comes as {_shapes(chip)}")
  if slices < 1:
    raise UserError(f"slices {slices} is less than 1")
  return Topology(chip, tuple(map(int, numbers)), slices)


def _is_built(chip: Chip, shape: tuple[int, ...]) -> bool:
  if not chip.sizes or len(shape) != len(chip.sizes):
    return not chip.sizes and len(shape) == 1
  dims = sorted(shape)
  if dims in [sorted(map(int, text.split("x"))) for text in _FLAT + _WITHIN]:
    return True
  within = all(n % _EDGE == 0 and n <= most for n, most in zip(dims, chip.sizes, strict=True))
  return len(dims) == 3 and within


def _shapes(chip: Chip) -> str:
  if not chip.sizes:
    return "a number of chips, as h100:64"
  if len(chip.sizes) == 2:
    return ", ".join(_FLAT)
  largest = "x".join(map(str, chip.sizes))
  return f"{', '.join(_WITHIN)}, or multiples of {_EDGE} up to {largest}"
