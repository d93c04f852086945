"""Rotary position embeddings with their scalings for longer contexts, and sinusoidal positions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.core.platform import platform

SINUSOIDS = ("sinusoidal", "sinusoidal_halves", "sinusoidal_t2t")
KINDS = ("rope", "learned", *SINUSOIDS, "alibi", "relative", "none")
LAYOUTS = ("half", "interleaved")
SCALINGS = ("none", "linear", "ntk", "yarn", "llama3", "longrope")
_LEAST_CONTEXT = {"yarn": 1, "llama3": 1, "longrope": 2}  # least original_context of a scaling


@dataclasses.dataclass(frozen=True)
class PositionConfig:
  """The kind of position embedding.

  Attributes:
    kind: rope; learned (a table of `model.max_seq_len` rows); sinusoidal (sines and cosines
      alternate), sinusoidal_halves (all sines, then all cosines: Marian), sinusoidal_t2t (likewise,
      the last wavelength exactly theta times the first: Tensor2Tensor, OpenNMT, fairseq); alibi;
      relative (T5's learned bias by distance); none.
    first: a document's first position, for sinusoids: 1 in OpenNMT, 2 in fairseq.
    theta: base of the rotary angles, and of sinusoids.
    local_theta: base in the window layers of `model.attention.pattern`, unscaled; 0 means theta.
    fraction: share of a head's channels that are rotated, rounded up to an even number of channels.
    layout: rope pairs channels i and i + r/2 (half), or 2i and 2i + 1 (interleaved).
    scaling: extension of rope to longer contexts: none, linear, ntk, yarn, llama3, longrope.
    factor: how many times longer.
    original_context: positions before the extension; yarn, llama3 and longrope.
    low_freq_factor: llama3: channels with fewer rotations in the original context are interpolated.
    high_freq_factor: llama3: channels with more rotations are unchanged.
    beta_fast: yarn: channels with more rotations in the original context are unchanged.
    beta_slow: yarn: channels with fewer rotations are interpolated.
    attention_factor: yarn and longrope: factor on the angles' cosine and sine; 0 means
      0.1 ln(factor) + 1 for yarn and √(1 + ln(factor) / ln(original_context)) for longrope.
    divisors: longrope: divisor of each channel pair's angle, first for documents of at most
      `original_context` positions, then as many for longer ones.
    buckets: relative: rows of the table.
    max_distance: relative: all distances from here on share the last bucket.
  """

  kind: str = "rope"
  first: int = 0
  theta: float = 10_000.0
  local_theta: float = 0.0
  fraction: float = 1.0
  layout: str = "half"
  scaling: str = "none"
  factor: float = 1.0
  original_context: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0
  divisors: tuple = ()
  buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    check_fields(
      "model.position", self, kind=KINDS, layout=LAYOUTS, scaling=SCALINGS, factor=1, first=0,
      fraction="(0, 1]", attention_factor=0, original_context=0, buckets=4,
      max_distance=self.buckets // 2 + 1,
    )
    if self.first and self.kind not in SINUSOIDS:
      raise UserError(
        f"model.position.first {self.first} changes nothing with model.position.kind={self.kind}"
      )
    if self.theta <= 1:
      raise UserError(f"model.position.theta {self.theta} is not above 1")
    if self.local_theta and self.local_theta <= 1:
      raise UserError(f"model.position.local_theta {self.local_theta} is neither 0 nor above 1")
    if self.original_context < _LEAST_CONTEXT.get(self.scaling, 0):
      raise UserError(f"model.position.scaling={self.scaling} needs original_context")
    if not all(type(each) in (int, float) and each > 0 for each in self.divisors):
      raise UserError(f"model.position.divisors {self.divisors} are not all positive numbers")
    if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
      raise UserError(
        f"model.position.high_freq_factor {self.high_freq_factor} is not above "
        f"low_freq_factor {self.low_freq_factor}, or that not above 0"
      )
    if self.scaling == "yarn" and not self.beta_fast > self.beta_slow > 0:
      raise UserError(
        f"model.position.beta_fast {self.beta_fast} and beta_slow {self.beta_slow} are not "
        "in order: beta_fast > beta_slow > 0"
      )

  def check(self, head_dim: int):
    """Raises a `UserError` where rope does not fit heads of this width."""
    r, scaling = self.rotary_width(head_dim), f"model.position.scaling={self.scaling}"
    if not r:
      raise UserError(f"model.position.fraction {self.fraction} of {head_dim} turns nothing")
    if self.rotary_dim(head_dim) > head_dim:
      raise UserError(f"head width {head_dim} is odd; rotary positions on all of it need it even")
    if self.scaling == "ntk" and r < 3:
      raise UserError(f"{scaling} needs more than 2 rotary channels a head, not {r}")
    if self.scaling in ("yarn", "longrope") and r % 2:
      raise UserError(f"{scaling} needs an even number of rotary channels, not {r}")
    if self.scaling == "longrope" and len(self.divisors) != r:
      raise UserError(
        f"model.position.divisors are {len(self.divisors)}, not twice {r // 2} channel pairs"
      )

  def rotary_dim(self, head_dim: int) -> int:
    """Channels of a head that are rotated, an even number."""
    return 2 * math.ceil(self.rotary_width(head_dim) / 2)

  def rotary_width(self, head_dim: int) -> int:
    """The width r that angles are computed from: `fraction` of a head, which may be odd."""
    return int(head_dim * self.fraction)

  @property
  def amplitude(self) -> float:
    """The factor on the angles' cosine and sine."""
    if self.scaling not in ("yarn", "longrope"):
      return 1.0
    growth = math.log(self.factor)
    if self.scaling == "yarn":
      return self.attention_factor or 0.1 * growth + 1
    return self.attention_factor or math.sqrt(1 + growth / math.log(self.original_context))


def rope_frequencies(
  config: PositionConfig, head_dim: int, local: bool = False, long: bool = False
) -> np.ndarray:
  """Computes each channel pair's rotation per position: theta^(-2i/r), scaled.

  Args:
    local: of a window layer: `local_theta`, where there is one, and no scaling.
    long: longrope: of a document longer than `original_context`.
  Returns:
    float64 [⌈r/2⌉], radians per position.
  Source: Su et al. 2021, arXiv:2104.09864, sec. 3.2.2; linear: Chen et al. 2023,
    arXiv:2306.15595; ntk and yarn: Peng et al. 2023, arXiv:2309.00071, sec. 3; llama3: Llama team
    2024, arXiv:2407.21783, and the scaling its release computes; longrope: Ding et al. 2024,
    arXiv:2402.13753, sec. 3.
  """
  r = config.rotary_width(head_dim)
  exponents = np.arange(0, r, 2) / r
  if local and config.local_theta:
    return config.local_theta**-exponents
  frequencies = config.theta**-exponents
  if config.scaling == "linear":
    return frequencies / config.factor
  if config.scaling == "ntk":
    return (config.theta * config.factor ** (r / (r - 2))) ** -exponents
  if config.scaling == "longrope":
    return frequencies / np.split(np.array(config.divisors), 2)[int(long)]
  if config.scaling == "none":
    return frequencies
  if config.scaling == "yarn":
    unchanged = _yarn_ramp(config, r)
  else:  # llama3
    rotations = config.original_context * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    unchanged = np.clip((rotations - low) / (high - low), 0, 1)
  return frequencies * unchanged + frequencies / config.factor * (1 - unchanged)


def _yarn_ramp(config: PositionConfig, r: int):
  def channel(rotations):
    ratio = config.original_context / (rotations * 2 * math.pi)
    return r * math.log(ratio) / (2 * math.log(config.theta))

  low = max(math.floor(channel(config.beta_fast)), 0)
  high = min(math.ceil(channel(config.beta_slow)), r - 1)
  ramp = (np.arange(r // 2) - low) / ((high - low) or 0.001)
  return 1 - np.clip(ramp, 0, 1)


def rope_angles(
  positions_bt, config: PositionConfig, head_dim: int, local: bool = False, segments_bt=None
):
  """Computes the rotation of every position; arguments as `rope_frequencies` takes.

  Args:
    segments_bt: document numbers, by which longrope knows a document's length; without them a row
      is one document.
  Returns:
    (cos, sin), fp32 [b, t, r/2].
  """
  unscaled = bool(local and config.local_theta)
  frequencies = jnp.asarray(rope_frequencies(config, head_dim, local), jnp.float32)
  if config.scaling == "longrope" and not unscaled:
    long = jnp.asarray(rope_frequencies(config, head_dim, long=True), jnp.float32)
    is_long_bt = _last_position(positions_bt, segments_bt) >= config.original_context
    frequencies = jnp.where(is_long_bt[..., None], long, frequencies)
  angles = positions_bt[..., None].astype(jnp.float32) * frequencies
  factor = 1.0 if unscaled else config.amplitude
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _last_position(positions_bt, segments_bt):
  if segments_bt is None:
    return jnp.broadcast_to(positions_bt.max(1, keepdims=True), positions_bt.shape)
  count = segments_bt.shape[1] + 1
  last = jax.vmap(lambda *row: jax.ops.segment_max(*row, num_segments=count))
  return jnp.take_along_axis(last(positions_bt, segments_bt), segments_bt, axis=1)


def rotate(x_btnh, cos, sin, layout: str = "half"):
  """Rotates channel pairs of a head by their position's angle, in fp32; channels past r stay.

  Args:
    cos: [b, t, r/2] from `rope_angles`; `sin` likewise.
    layout: half pairs i with i + r/2, interleaved 2i with 2i + 1.
  Returns:
    y_btnh, dtype of `x_btnh`.
  Source: Su et al. 2021, arXiv:2104.09864, eq. 15.
  """
  r = 2 * cos.shape[-1]
  if layout == "half":
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  else:
    cos = jnp.repeat(cos, 2, axis=-1)
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
  rotated = _rotate(layout, x_btnh[..., :r], cos[:, :, None], sin[:, :, None])
  if r == x_btnh.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_btnh[..., r:]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(layout, x, cos, sin):
  """x · cos + (x with each pair swapped) · sin; the gradient is the same with the other sign. The
  tables have full width: XLA's CPU backend recomputes the angles for every head where halves are
  concatenated after the products."""
  return (x.astype(jnp.float32) * cos + _swapped(layout, x) * sin).astype(x.dtype)


_rotate.defvjp(
  lambda layout, x, cos, sin: (_rotate(layout, x, cos, sin), (cos, sin)),
  lambda layout, tables, grad: (_rotate(layout, grad, tables[0], -tables[1]), None, None),
)


def _swapped(layout, x):
  """x, fp32, with the channels of each pair swapped. On a TPU by an (exact) product with a
  permutation, since halves of a head are slow to move there."""
  r = x.shape[-1]
  if platform() == "tpu":
    channels = np.arange(r)
    pair = (channels + r // 2) % r if layout == "half" else channels ^ 1
    swap = jnp.asarray(np.eye(r)[pair], x.dtype)
    return jnp.einsum(
      "btnh,hi->btni", x, swap, precision="highest", preferred_element_type=jnp.float32
    )
  wide = x.astype(jnp.float32)
  if layout == "half":
    return jnp.concatenate([wide[..., r // 2 :], wide[..., : r // 2]], axis=-1)
  return jnp.stack([wide[..., 1::2], wide[..., ::2]], axis=-1).reshape(wide.shape)


def sinusoids(positions_bt, width: int, config: PositionConfig):
  """Computes fixed position vectors: sin and cos of position · theta^(-2i/width).

  Args:
    positions_bt: int32 positions within the document, from 0; `config.first` is added.
    width: d; odd only where sines and cosines alternate.
    config: its kind decides the order of channels, and whether exponents are 2i/width or, as in
      sinusoidal_t2t, i / (width/2 - 1).
  Returns:
    p_btd, fp32.
  Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5, and its released code, Tensor2Tensor.
  """
  steps = np.arange((width + 1) // 2)
  span = width / 2 - 1 if config.kind == "sinusoidal_t2t" else width / 2
  frequencies = jnp.asarray(config.theta ** -(steps / span), jnp.float32)
  angles = (positions_bt[..., None] + config.first).astype(jnp.float32) * frequencies
  waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  if config.kind != "sinusoidal":
    waves = waves.swapaxes(-1, -2)
  return waves.reshape(*positions_bt.shape, -1)[..., :width]
