"""Optimizers in float64, an array at a time, and schedules, an update at a time: from papers."""

import math

import numpy as np


def schedule(text, number, peak, warmup, steps, final):
  """Learning rate of a run's update `number`, from 1: `warmup` is at the peak, `steps` the last.

  `text` is a name, or `wsd` with its number of steps of decay and its shape, `cosine` or `linear`
  with a number of cycles: "wsd 4 sqrt", "cosine 3".
  """
  if number <= warmup:
    return peak * number / warmup
  name, *options = text.split()
  share = (number - warmup) / (steps - warmup)  # in (0, 1] of the steps after the warm-up
  if name in ("cosine", "linear"):
    cycles = int(options[0]) if options else 1
    done = next(k for k in range(cycles) if share <= (k + 1) / cycles + 1e-12)
    share = share * cycles - done
    fallen = (1 - math.cos(math.pi * share)) / 2 if name == "cosine" else share
  elif name == "constant":
    return peak
  elif name == "inverse_sqrt":
    return peak * math.sqrt(max(warmup, 1) / number)
  else:
    left = steps - number  # updates after this one
    through = max(0.0, 1 - left / int(options[0]))
    fallen = math.sqrt(through) if options[1] == "sqrt" else through
  return peak * (1 - (1 - final) * fallen)


def warmup_cosine(number, peak, warmup, steps, final):
  """`schedule` of a cosine."""
  return schedule("cosine", number, peak, warmup, steps, final)


def clip(grads, norm):
  """Scales all gradients so that their joint Euclidean norm is at most `norm`."""
  total = math.sqrt(sum(float(np.sum(np.square(g))) for g in grads.values()))
  return {name: g * min(1.0, norm / total) for name, g in grads.items()}, total


def adamw(weights, steps_of_grads, *, rate, beta1, beta2, eps, decay, decayed):
  """Applies one update a dict of gradients; `rate(number)` from 1, `decayed` is a set of names."""
  return {
    name: descend(
      "adamw", w, lambda _, number, name=name: steps_of_grads[number - 1][name],
      steps=len(steps_of_grads), rate=rate, beta1=beta1, beta2=beta2, eps=eps,
      decay=decay if name in decayed else 0.0,
    )
    for name, w in weights.items()
  }


def descend(kind, weight, gradient, *, steps, rate, beta1, beta2, eps, decay):
  """Applies updates to an array [in, out]: w − rate · (direction + decay · w).

  Args:
    gradient: (weights, number) -> gradient, numbers from 1.
    rate: number -> learning rate.
  Returns:
    What is evaluated; of schedule_free the average.
  """
  weight = np.asarray(weight, np.float64)
  if kind == "schedule_free":
    return _schedule_free(weight, gradient, steps, rate, beta1, beta2, eps, decay)
  kept = {}
  for number in range(1, steps + 1):
    g = np.asarray(gradient(weight, number), np.float64)
    if kind in ("adamw", "adam"):  # Loshchilov & Hutter 2019, alg. 2
      kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
      kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * g * g
      mean, square = kept["m"] / (1 - beta1**number), kept["v"] / (1 - beta2**number)
      direction = mean / (np.sqrt(square) + eps)
    elif kind == "sgd":  # Polyak's heavy ball
      direction = kept["m"] = beta1 * kept.get("m", 0) + g
    elif kind == "lion":  # Chen et al. 2023, alg. 2
      direction = np.sign(beta1 * kept.get("m", 0) + (1 - beta1) * g)
      kept["m"] = beta2 * kept.get("m", 0) + (1 - beta2) * g
    elif kind == "adafactor":
      direction = _adafactor(kept, weight, g, number)
    else:  # Muon, with Nesterov's momentum of 0.95
      kept["m"] = 0.95 * kept.get("m", 0) + 0.05 * g
      ahead = 0.95 * kept["m"] / (1 - 0.95 ** (number + 1)) + 0.05 * g / (1 - 0.95**number)
      rows, columns = weight.shape
      direction = math.sqrt(max(1, columns / rows)) * newton_schulz(ahead)
    weight = weight - rate(number) * (direction + decay * weight)
  return weight


def _adafactor(kept, weight, g, number):
  """Shazeer & Stern 2018, alg. 5, with relative step sizes; alg. 4 for vectors."""
  rms = lambda x: math.sqrt(np.mean(np.square(x)))  # noqa: E731
  share, square = 1 - number**-0.8, np.square(g) + 1e-30
  if g.ndim == 2 and min(g.shape) >= 128:
    kept["rows"] = share * kept.get("rows", 0) + (1 - share) * square.mean(axis=1)
    kept["columns"] = share * kept.get("columns", 0) + (1 - share) * square.mean(axis=0)
    square = np.outer(kept["rows"], kept["columns"]) / kept["rows"].mean()
  else:
    square = kept["v"] = share * kept.get("v", 0) + (1 - share) * square
  update = g / np.sqrt(square)
  return update / max(1.0, rms(update)) * max(1e-3, rms(weight))


def _schedule_free(weight, gradient, steps, rate, beta1, beta2, eps, decay):
  """Defazio et al. 2024, alg. 1 (AdamW), averages weighed by the square of the largest rate."""
  x, z, v, total = weight, weight, 0.0, 0.0
  for number in range(1, steps + 1):
    y = (1 - beta1) * z + beta1 * x
    g = gradient(y, number)
    v = beta2 * v + (1 - beta2) * g * g
    z = z - rate(number) * (g / (np.sqrt(v / (1 - beta2**number)) + eps) + decay * y)
    weigh = max(rate(n) for n in range(1, number + 1)) ** 2
    total += weigh
    x = (1 - weigh / total) * x + weigh / total * z
  return x


def newton_schulz(matrix, steps=5):
  """Brings a matrix's singular values near 1: Jordan et al. 2024, the quintic iteration."""
  wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  x = wide / np.linalg.norm(wide)
  for _ in range(steps):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x if wide is matrix else x.T


def muon(weight, grads, *, rate, decay):
  """Applies one Muon update a gradient to a matrix [in, out]; `rate(number)` from 1."""
  return descend(
    "muon", weight, lambda _, number: grads[number - 1], steps=len(grads), rate=rate, beta1=0,
    beta2=0, eps=0, decay=decay,
  )
