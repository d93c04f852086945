"""Layers of every kind from their papers, in float64, for the whole models of `decoder.py`.

`cfg` is a plain dict of a config's values by dotted key. One row, head or channel at a time where
that says it more plainly.
"""

import math

import numpy as np
from scipy.special import erf


def norm(x, weights, cfg):
  """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4).

  `weights` holds `scale_…` and maybe `bias_…`; as many last axes as the scale has are one vector.
  """
  scale = next(array for name, array in weights.items() if name.startswith("scale_"))
  bias = next((array for name, array in weights.items() if name.startswith("bias_")), 0.0)
  axes = tuple(range(-scale.ndim, 0))
  if cfg["norm.kind"] == "layer":
    x = x - x.mean(axes, keepdims=True)
  return x / np.sqrt((x * x).mean(axes, keepdims=True) + cfg["norm.eps"]) * scale + bias


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


ACTIVATION = {
  "relu": lambda x: np.maximum(x, 0),
  "relu2": lambda x: np.maximum(x, 0) ** 2,  # So et al. 2021
  "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,  # Hendrycks & Gimpel 2016
  "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
  "quick_gelu": lambda x: x * sigmoid(1.702 * x),
  "silu": lambda x: x * sigmoid(x),
}
GATE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def mlp(x, w, cfg):
  """act(x W + b) V + c, or Shazeer 2020's act(x G + a) ⊗ (x W + b) V + c."""
  name = cfg["activation"]
  up = x @ w["up_df"] + w.get("up_bias_f", 0.0)
  if name in GATE:
    hidden = ACTIVATION[GATE[name]](x @ w["gate_df"] + w.get("gate_bias_f", 0.0)) * up
  else:
    hidden = ACTIVATION[name](up)
  return hidden @ w["down_fd"] + w.get("down_bias_d", 0.0)


def turns(cfg, r, local, long=False):
  """Radians a position by channel pair, and the factor on queries and keys (RoPE's scalings)."""
  base, factor = cfg["position.theta"], cfg["position.factor"]
  scaling = cfg["position.scaling"]
  if local and cfg["position.local_theta"]:
    base, scaling = cfg["position.local_theta"], "none"
  if scaling == "ntk":  # Peng et al. 2023, def. 1
    base = base * factor ** (r / (r - 2))
  plain = [base ** (-2 * i / r) for i in range(r // 2)]
  if scaling == "linear":  # Chen et al. 2023, eq. 4
    return [w / factor for w in plain], 1.0
  if scaling == "yarn":
    return _yarn(cfg, r, plain)
  if scaling == "llama3":
    return [_llama3(cfg, w) for w in plain], 1.0
  if scaling == "longrope":  # Ding et al. 2024, eq. 2; short ones first, then long ones
    growth = math.log(factor) / math.log(cfg["position.original_context"])
    divisors = cfg["position.divisors"]
    divisors = divisors[len(plain) :] if long else divisors[: len(plain)]
    factor = cfg["position.attention_factor"] or math.sqrt(1 + growth)
    return [w / divisor for w, divisor in zip(plain, divisors, strict=True)], factor
  return plain, 1.0


def _llama3(cfg, w):
  """The scaling of Llama 3.1's release: by wavelength, in three zones."""
  original, factor = cfg["position.original_context"], cfg["position.factor"]
  low, high = cfg["position.low_freq_factor"], cfg["position.high_freq_factor"]
  wavelength = 2 * math.pi / w
  if wavelength < original / high:
    return w
  if wavelength > original / low:
    return w / factor
  smooth = (original / wavelength - low) / (high - low)
  return (1 - smooth) * w / factor + smooth * w


def _yarn(cfg, r, plain):
  """Peng et al. 2023, sec. 3.2 and 3.4, with the ramp over channels of the authors' code."""
  original, factor = cfg["position.original_context"], cfg["position.factor"]

  def channel(rotations):
    return r * math.log(original / (rotations * 2 * math.pi)) / 2 / math.log(cfg["position.theta"])

  low = max(0, math.floor(channel(cfg["position.beta_fast"])))
  high = min(r - 1, math.ceil(channel(cfg["position.beta_slow"])))
  high = high + 0.001 if low == high else high
  made = []
  for i, w in enumerate(plain):
    stretched = min(1.0, max(0.0, (i - low) / (high - low)))
    made.append(w / factor * stretched + w * (1 - stretched))
  return made, cfg["position.attention_factor"] or 0.1 * math.log(factor) + 1


def documents(positions_bt):
  """Lists (row, start, end) of documents, each of which begins at position 0."""
  for row, positions in enumerate(positions_bt):
    starts = [0, *(i for i in range(1, len(positions)) if positions[i] == 0)]
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
      yield row, start, end


def rotary(x_btnh, positions_bt, cfg, local):
  """Su et al. 2021, eq. 13: channel pairs are complex numbers, turned by position · frequency."""
  r = int(x_btnh.shape[-1] * cfg["position.fraction"]) // 2 * 2
  y = x_btnh.copy()
  for row, start, end in documents(positions_bt):
    positions = positions_bt[row, start:end]
    long = positions.max() >= cfg["position.original_context"]
    frequencies, factor = turns(cfg, r, local, long)
    for i, frequency in enumerate(frequencies):
      one, two = (i, i + r // 2) if cfg["position.layout"] == "half" else (2 * i, 2 * i + 1)
      x = x_btnh[row, start:end]
      turned = (x[..., one] + 1j * x[..., two]) * np.exp(1j * frequency * positions[:, None])
      y[row, start:end, :, one] = turned.real * factor
      y[row, start:end, :, two] = turned.imag * factor
  return y


def sinusoid(position, d, cfg):
  """One position's vector: Vaswani et al. 2017, sec. 3.5, and two orders found in released code.

  Marian: all sines, then all cosines. Tensor2Tensor: likewise, of num_timescales = d/2 wavelengths
  whose logarithms lie evenly from the first to the last, both included.
  """
  theta, kind = cfg["position.theta"], cfg["position.kind"]
  position += cfg["position.first"]
  if kind == "sinusoidal":
    angle = [position / theta ** (2 * (i // 2) / d) for i in range(d)]
    return np.array([math.sin(a) if i % 2 == 0 else math.cos(a) for i, a in enumerate(angle)])
  half = d // 2
  if kind == "sinusoidal_t2t":
    scales = [math.exp(-i * math.log(theta) / (half - 1)) for i in range(half)]
  else:
    scales = [1 / theta ** (2 * i / d) for i in range(half)]
  return np.array([f(position * scale) for f in (math.sin, math.cos) for scale in scales])


def alibi_slopes(n):
  """Press et al. 2021: 2^(-8/n), its square … ; else as the authors' code fills up."""
  power = 1
  while 2 * power <= n:
    power *= 2
  slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
  if power < n:
    slopes += alibi_slopes(2 * power)[0::2][: n - power]
  return slopes


def bucket(distance, buckets, max_distance, both_ways):
  """T5's bucket of a distance key - query (Raffel et al. 2019, sec. 2.1 and released code)."""
  first = 0
  if both_ways:
    buckets //= 2
    if distance > 0:
      first = buckets
    distance = abs(distance)
  else:
    distance = max(0, -distance)
  exact = buckets // 2
  if distance < exact:
    return first + distance
  far = math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
  return first + min(buckets - 1, exact + math.floor(far))


def may_look(query, key, same, prefix, layer, cfg, causal):
  """Whether a query at a position sees a key: `same` document, `prefix` a key that all see."""
  if not same:
    return False
  if prefix:
    return True
  if causal and key > query:
    return False
  if layer == "window":
    return abs(query - key) < cfg["attention.window"]
  if layer == "sparse":
    mine, other = query // cfg["attention.sparse_block"], key // cfg["attention.sparse_block"]
    apart, stride = abs(mine - other), cfg["attention.sparse_stride"]
    return (
      apart < cfg["attention.sparse_local"]
      or mine < cfg["attention.sparse_global"]
      or other < cfg["attention.sparse_global"]
      or (stride > 0 and apart % stride == 0)
    )
  return True


def masks(layer, cfg, causal, positions_bt, segments_bt, prefix_bt):
  """[b, t, s] of who sees whom in a row that looks at itself."""
  b, t = positions_bt.shape
  out = np.zeros((b, t, t), bool)
  for row, query, key in np.ndindex(b, t, t):
    out[row, query, key] = may_look(
      positions_bt[row, query],
      positions_bt[row, key],
      segments_bt[row, query] == segments_bt[row, key],
      prefix_bt is not None and prefix_bt[row, key],
      layer,
      cfg,
      causal,
    )
  return out


def biases(cfg, causal, positions_bt, table):
  """[b, n, t, s] added to scores by distance; `table` is T5's [buckets, n]."""
  if cfg["position.kind"] not in ("alibi", "relative"):
    return None
  b, t = positions_bt.shape
  out = np.zeros((b, cfg["heads"], t, t))
  slopes = np.array(alibi_slopes(cfg["heads"]))
  for row, query, key in np.ndindex(b, t, t):
    distance = int(positions_bt[row, key] - positions_bt[row, query])
    if cfg["position.kind"] == "alibi":
      out[row, :, query, key] = -slopes * abs(distance)
    else:
      out[row, :, query, key] = table[
        bucket(distance, cfg["position.buckets"], cfg["position.max_distance"], not causal)
      ]
  return out


def attend(q_btnh, k_bskh, v_bskh, see_bts, cfg, bias_bnts=None, sinks_n=None):
  """Vaswani et al. 2017, eq. 1, one row and head at a time; heads in groups of n / k.

  Scores are capped (Gemma 2), then biased; a sink is one more score without a value. A query that
  sees nothing gets nothing: no test reads it.
  """
  b, _, n, h = q_btnh.shape
  group = n // k_bskh.shape[2]
  o = np.zeros((*q_btnh.shape[:3], v_bskh.shape[-1]))
  for row, head in np.ndindex(b, n):
    scores = q_btnh[row, :, head] @ k_bskh[row, :, head // group].T
    scores = scores * (cfg["attention.scale"] or 1 / math.sqrt(h))
    if cfg["attention.softcap"]:
      scores = cfg["attention.softcap"] * np.tanh(scores / cfg["attention.softcap"])
    if bias_bnts is not None:
      scores = scores + bias_bnts[row, head]
    grown = np.where(see_bts[row], np.exp(scores), 0.0)
    total = grown.sum(-1, keepdims=True) + (0 if sinks_n is None else np.exp(sinks_n[head]))
    o[row, :, head] = grown / np.where(total == 0, 1, total) @ v_bskh[row, :, head // group]
  return o
