"""The distribution a sampler should draw from, token by token, in float64."""

import math


def distribution(logits, temperature, top_k, top_p, min_p=0.0):
  """Probabilities after temperature, top-k, nucleus (Holtzman et al. 2020, sec. 3.1), min-p."""
  ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
  if top_k:
    ranked = ranked[:top_k]
  raw = {token: math.exp((logits[token] - max(logits)) / temperature) for token in ranked}
  total = sum(raw.values())
  kept, reached = {}, 0.0
  for token in ranked:
    if reached >= top_p or raw[token] < min_p * raw[ranked[0]]:
      break
    kept[token] = raw[token] / total
    reached += kept[token]
  return [kept.get(token, 0.0) / reached for token in range(len(logits))]
