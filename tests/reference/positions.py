"""Positions from their papers: rotary and its stretchings, sinusoids, ALiBi, T5's buckets."""

import math

import numpy as np


def linear(theta, r, factor):
  """Chen et al. 2023, eq. 4: position m becomes m / factor, so every angle shrinks."""
  return [theta ** (-2 * i / r) / factor for i in range(r // 2)]


def ntk(theta, r, factor):
  """Peng et al. 2023, definition 1: the base becomes theta · factor^(r / (r - 2))."""
  base = theta * factor ** (r / (r - 2))
  return [base ** (-2 * i / r) for i in range(r // 2)]


def yarn(theta, r, factor, original, fast, slow):
  """Peng et al. 2023, sec. 3.2, with the ramp of the authors' code, which runs over the channels.

  The paper's ramp runs over the turns instead; both agree where a channel turns more than `fast` or
  less than `slow` times. A channel's number is that from which theta^(-2i/r) · original / 2π turns
  follow, solved for i.
  """

  def number(turns):
    return math.log(original / (2 * math.pi * turns)) / math.log(theta) * r / 2

  first, last = max(math.floor(number(fast)), 0), min(math.ceil(number(slow)), r - 1)
  angles = []
  for i in range(r // 2):
    angle = theta ** (-2 * i / r)
    if i <= first:
      stretched = 0.0
    elif i >= last:
      stretched = 1.0
    else:
      stretched = (i - first) / (last - first)
    angles.append((1 - stretched) * angle + stretched * angle / factor)
  return angles


def llama3(theta, r, factor, original, low, high):
  """The scaling that Meta released with Llama 3.1, by wavelength."""
  angles = []
  for i in range(r // 2):
    angle = theta ** (-2 * i / r)
    wavelength = 2 * math.pi / angle
    if wavelength < original / high:
      angles.append(angle)
    elif wavelength > original / low:
      angles.append(angle / factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      angles.append((1 - smooth) * angle / factor + smooth * angle)
  return angles


def rotary(x_btnh, positions_bt, theta=None, *, angles=None, layout="half", stretch=1.0):
  """Su et al. 2021, eq. 13: a pair of channels is a complex number, turned by m · theta^(-2i/h).

  `angles` replaces theta^(-2i/h), one a pair; where they are fewer than h / 2, the last channels
  stay. `layout` half pairs i with i + r/2, interleaved 2i with 2i + 1. `stretch` is YaRN's factor.
  """
  h = x_btnh.shape[-1]
  if angles is None:
    angles = [theta ** (-2 * i / h) for i in range(h // 2)]
  count = len(angles)
  y_btnh = np.array(x_btnh)
  for row, place, head in np.ndindex(x_btnh.shape[:-1]):
    vector, position = x_btnh[row, place, head], int(positions_bt[row, place])
    for i in range(count):
      one, other = (i, i + count) if layout == "half" else (2 * i, 2 * i + 1)
      turned = complex(vector[one], vector[other]) * np.exp(1j * position * angles[i]) * stretch
      y_btnh[row, place, head, one] = turned.real
      y_btnh[row, place, head, other] = turned.imag
  return y_btnh


def sinusoid(position, width, theta=10_000.0):
  """Vaswani et al. 2017, sec. 3.5: PE(pos, 2i) = sin(pos / theta^(2i/d)), PE(pos, 2i + 1) = cos."""
  vector = []
  for channel in range(width):
    angle = position / theta ** ((channel - channel % 2) / width)
    vector.append(math.cos(angle) if channel % 2 else math.sin(angle))
  return vector


def alibi_slopes(heads):
  """Press et al. 2021, sec. 3 and appendix: 2^(-8/n), 2^(-16/n), … for n a power of two.

  For another n: the slopes of the next smaller power, then the 1st, 3rd, … of the next larger.
  """
  powers = [2**i for i in range(20)]
  if heads in powers:
    return [2.0 ** (-8 * i / heads) for i in range(1, heads + 1)]
  smaller = max(power for power in powers if power < heads)
  return alibi_slopes(smaller) + alibi_slopes(2 * smaller)[0::2][: heads - smaller]


def relative_bucket(distance, buckets, max_distance, both_ways):
  """Raffel et al. 2019, sec. 2.1 and their code; `distance` is key minus query, a number.

  Half of a side's buckets hold one distance each; the other half grow up to `max_distance` in
  equal steps of the logarithm; what is further shares the last.
  """
  first = 0
  if both_ways:
    buckets = buckets // 2
    first = buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(0, -distance)  # keys to come share bucket 0
  near = buckets // 2
  if distance < near:
    return first + distance
  steps = buckets - near
  bucket = near
  # Bucket near + j begins at near · (max / near)^(j / steps); the margin is for float64's powers.
  for j in range(1, steps):
    if distance >= near * (max_distance / near) ** (j / steps) * (1 - 1e-12):
      bucket = near + j
  return first + bucket
