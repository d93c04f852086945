"""AdamW with clipping in float64, name by name: Loshchilov & Hutter 2019, alg. 2."""

import math

import numpy as np


def warmup_cosine(number, peak, warmup, steps, final):
  """Learning rate of a run's update `number`, from 1: `warmup` is at the peak, `steps` the last."""
  if number <= warmup:
    return peak * number / warmup
  share = min(1.0, (number - warmup) / (steps - warmup))
  return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def clip(grads, norm):
  """Scales all gradients so that their joint Euclidean norm is at most `norm`."""
  total = math.sqrt(sum(float(np.sum(np.square(g))) for g in grads.values()))
  return {name: g * min(1.0, norm / total) for name, g in grads.items()}, total


def adamw(weights, steps_of_grads, *, rate, beta1, beta2, eps, decay, decayed):
  """Applies one update a dict of gradients; `rate(number)` from 1, `decayed` is a set of names."""
  weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
  first = {name: np.zeros_like(w) for name, w in weights.items()}
  second = {name: np.zeros_like(w) for name, w in weights.items()}
  for number, grads in enumerate(steps_of_grads, start=1):
    for name, g in grads.items():
      g = np.asarray(g, np.float64)
      first[name] = beta1 * first[name] + (1 - beta1) * g
      second[name] = beta2 * second[name] + (1 - beta2) * g * g
      mean = first[name] / (1 - beta1**number)
      square = second[name] / (1 - beta2**number)
      change = mean / (np.sqrt(square) + eps)
      if name in decayed:
        change = change + decay * weights[name]
      weights[name] = weights[name] - rate(number) * change
  return weights


def newton_schulz(matrix, steps=5):
  """Brings a matrix's singular values near 1: Jordan et al. 2024, the quintic iteration."""
  wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  x = wide / np.linalg.norm(wide)
  for _ in range(steps):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x if wide is matrix else x.T


def muon(weight, grads, *, rate, decay, momentum=0.95):
  """Applies one Muon update a gradient to a matrix [in, out]; `rate(number)` from 1."""
  weight = np.asarray(weight, np.float64)
  mean = np.zeros_like(weight)
  scale = math.sqrt(max(1, weight.shape[1] / weight.shape[0]))
  for number, g in enumerate(grads, start=1):
    g = np.asarray(g, np.float64)
    mean = momentum * mean + (1 - momentum) * g
    ahead = momentum * mean / (1 - momentum ** (number + 1))
    ahead = ahead + (1 - momentum) * g / (1 - momentum**number)
    weight = weight - rate(number) * (scale * newton_schulz(ahead) + decay * weight)
  return weight
