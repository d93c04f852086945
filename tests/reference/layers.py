"""Single layers from their papers: norms, attention, feed-forward layers."""

import math

import numpy as np

from tests.reference.masks import keys_of as keys_seen
from tests.reference.positions import rotary


def rms_norm(x, scale, eps):
  """Zhang & Sennrich 2019, eq. 4: a_i / RMS(a) · g_i, RMS(a) = √(Σ a_i² / d + eps).

  The vector a is the last dimensions of `x`, as many as `scale` has.
  """
  y = np.empty_like(x)
  for place in np.ndindex(x.shape[: x.ndim - scale.ndim]):
    vector = x[place].ravel()
    root = np.sqrt(sum(value * value for value in vector) / len(vector) + eps)
    y[place] = x[place] / root * scale
  return y


def layer_norm(x, scale, bias, eps):
  """Ba et al. 2016, eq. 3 and 4: (a_i - μ) / σ · g_i + b_i, σ = √(Σ (a_i - μ)² / d + eps)."""
  y = np.empty_like(x)
  for place in np.ndindex(x.shape[: x.ndim - scale.ndim]):
    vector = x[place].ravel()
    mean = sum(vector) / len(vector)
    root = np.sqrt(sum((value - mean) ** 2 for value in vector) / len(vector) + eps)
    y[place] = (x[place] - mean) / root * scale + bias
  return y


def attention(
  q_btnh, k_bskh, v_bskh, keys_of, *, scale=None, softcap=0.0, bias_bnts=None, sinks_n=None
):
  """Vaswani et al. 2017, eq. 1, one row, head and query at a time; heads in groups of n / k.

  `keys_of[row][query]` lists the keys that the query may look at. `softcap` is Gemma 2's
  cap · tanh(score / cap), before the bias; a sink (gpt-oss) is one more score without a value.
  """
  b, t, n, h = q_btnh.shape
  group = n // k_bskh.shape[2]
  scale = 1 / np.sqrt(h) if scale is None else scale
  o_btnh = np.empty_like(q_btnh)
  for row in range(b):
    for query in range(t):
      keys = keys_of[row][query]
      for head in range(n):
        scores = k_bskh[row, keys, head // group] @ q_btnh[row, query, head] * scale
        if softcap:
          scores = softcap * np.tanh(scores / softcap)
        if bias_bnts is not None:
          scores = scores + bias_bnts[row, head, query, keys]
        exponential = np.exp(scores - scores.max())
        total = exponential.sum()
        if sinks_n is not None:
          total = total + np.exp(sinks_n[head] - scores.max())
        o_btnh[row, query, head] = exponential @ v_bskh[row, keys, head // group] / total
  return o_btnh


def mixing_layer(
  x_btd, source_bsd, weights, keys_of, *, turn=None, turn_source=None, norm=None, **scores
):
  """Projects, norms, turns, attends and projects back; `weights` is a dict by name.

  `turn` and `turn_source` rotate queries and keys; `norm(vectors, scale)` is that of both, whose
  scales stand in `weights` as `query_norm` and `key_norm`; absent biases are 0. `scores` are those
  of `attention`.
  """
  q = np.einsum("btd,dnh->btnh", x_btd, weights["query_dnh"]) + weights.get("query_bias_nh", 0)
  k = np.einsum("bsd,dkh->bskh", source_bsd, weights["key_dkh"]) + weights.get("key_bias_kh", 0)
  v = np.einsum("bsd,dkh->bskh", source_bsd, weights["value_dkh"])
  v = v + weights.get("value_bias_kh", 0)
  if norm is not None:
    q, k = norm(q, weights["query_norm"]), norm(k, weights["key_norm"])
  if turn is not None:
    q = turn(q)
  if turn_source is not None:
    k = turn_source(k)
  o = attention(q, k, v, keys_of, sinks_n=weights.get("sinks_n"), **scores)
  return np.einsum("btnh,nhd->btd", o, weights["out_nhd"]) + weights.get("out_bias_d", 0)


def attention_layer(x_btd, weights, segments_bt, positions_bt, theta):
  """Llama's: causal within a document, rotary positions, no biases."""

  def turn(heads):
    return rotary(heads, positions_bt, theta)

  keys_of = keys_seen(positions_bt, positions_bt, {"causal": True}, segments_bt, segments_bt)
  return mixing_layer(x_btd, x_btd, weights, keys_of, turn=turn, turn_source=turn)


def relu(z):
  """Nair & Hinton 2010: max(0, z)."""
  return max(0.0, z)


def gelu(z):
  """Hendrycks & Gimpel 2016, sec. 2: z Φ(z), Φ(z) = (1 + erf(z / √2)) / 2."""
  return z * (1 + math.erf(z / math.sqrt(2))) / 2


def gelu_tanh(z):
  """The same, approximated: z/2 · (1 + tanh(√(2/π) (z + 0.044715 z³)))."""
  return z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def swish(z):
  """Elfwing et al. 2017: z / (1 + e^-z)."""
  return z / (1 + math.exp(-z))


ACTIVATIONS = {
  "relu": relu,
  "relu2": lambda z: relu(z) ** 2,  # So et al. 2021
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),  # Hendrycks & Gimpel, sec. 2
  "silu": swish,
}
GATES = {"swiglu": swish, "geglu": gelu, "geglu_tanh": gelu_tanh, "reglu": relu}


def mlp(x_btd, weights, activation):
  """Shazeer 2020, eq. 6: (act(x W) ⊗ x V) W2; without a gate act(x V) W2; absent biases are 0."""
  up = x_btd @ weights["up_df"] + weights.get("up_bias_f", 0)
  if activation in GATES:
    gate = x_btd @ weights["gate_df"] + weights.get("gate_bias_f", 0)
    hidden = np.vectorize(GATES[activation], otypes=[float])(gate) * up
  else:
    hidden = np.vectorize(ACTIVATIONS[activation], otypes=[float])(up)
  return hidden @ weights["down_fd"] + weights.get("down_bias_d", 0)


def swiglu(x_btd, gate_df, up_df, down_fd):
  """Shazeer 2020, eq. 6, with Swish."""
  return mlp(x_btd, {"gate_df": gate_df, "up_df": up_df, "down_fd": down_fd}, "swiglu")
