"""Single layers from their papers: RMSNorm, rotary positions, attention, SwiGLU."""

import numpy as np


def rms_norm(x_btd, scale_d, eps):
  """Zhang & Sennrich 2019, eq. 4: a_i / RMS(a) · g_i, RMS(a) = √(Σ a_i² / d + eps)."""
  y_btd = np.empty_like(x_btd)
  for place in np.ndindex(x_btd.shape[:-1]):
    vector = x_btd[place]
    root = np.sqrt(sum(value * value for value in vector) / len(vector) + eps)
    y_btd[place] = vector / root * scale_d
  return y_btd


def rotary(x_btnh, positions_bt, theta):
  """Su et al. 2021, eq. 13: pair (i, i + h/2) is a complex number, turned by m · theta^(-2i/h)."""
  h = x_btnh.shape[-1]
  y_btnh = np.empty_like(x_btnh)
  for row, place, head in np.ndindex(x_btnh.shape[:-1]):
    vector, position = x_btnh[row, place, head], int(positions_bt[row, place])
    for i in range(h // 2):
      turn = np.exp(1j * position * theta ** (-2 * i / h))
      turned = complex(vector[i], vector[i + h // 2]) * turn
      y_btnh[row, place, head, i] = turned.real
      y_btnh[row, place, head, i + h // 2] = turned.imag
  return y_btnh


def may_look(segments_bt, positions_bt):
  """Lists, by row and query, the keys of its own document that do not come after it."""
  table = []
  for segments, positions in zip(segments_bt, positions_bt, strict=True):
    places = range(len(segments))
    table.append(
      [
        [s for s in places if segments[s] == segments[t] and positions[s] <= positions[t]]
        for t in places
      ]
    )
  return table


def attention(q_btnh, k_bskh, v_bskh, keys_of):
  """Vaswani et al. 2017, eq. 1, one row, head and query at a time; heads in groups of n / k.

  `keys_of[row][query]` lists the keys that the query may look at.
  """
  b, t, n, h = q_btnh.shape
  group = n // k_bskh.shape[2]
  o_btnh = np.empty_like(q_btnh)
  for row in range(b):
    for query in range(t):
      keys = keys_of[row][query]
      for head in range(n):
        scores = k_bskh[row, keys, head // group] @ q_btnh[row, query, head] / np.sqrt(h)
        exponential = np.exp(scores - scores.max())
        weights = exponential / exponential.sum()
        o_btnh[row, query, head] = weights @ v_bskh[row, keys, head // group]
  return o_btnh


def attention_layer(x_btd, weights, segments_bt, positions_bt, theta):
  """Projects, turns, attends and projects back; `weights` is a dict by name."""
  q = np.einsum("btd,dnh->btnh", x_btd, weights["query_dnh"])
  k = np.einsum("btd,dkh->btkh", x_btd, weights["key_dkh"])
  v = np.einsum("btd,dkh->btkh", x_btd, weights["value_dkh"])
  q, k = rotary(q, positions_bt, theta), rotary(k, positions_bt, theta)
  o = attention(q, k, v, may_look(segments_bt, positions_bt))
  return np.einsum("btnh,nhd->btd", o, weights["out_nhd"])


def swiglu(x_btd, gate_df, up_df, down_fd):
  """Shazeer 2020, eq. 6: (Swish(x W) ⊗ x V) W2, Swish(z) = z / (1 + e^-z)."""
  gate = x_btd @ gate_df
  return (gate / (1 + np.exp(-gate)) * (x_btd @ up_df)) @ down_fd
