"""Cross entropy and the terms beside it, one position after another."""

import numpy as np


def cross_entropy(logits_btv, targets_bt, mask_bt):
  """Σ mask · -log(e^z_target / Σ e^z) and Σ mask."""
  return objective(logits_btv, targets_bt, mask_bt, 0.0, 0.0), float(np.sum(mask_bt))


def objective(logits_btv, targets_bt, mask_bt, smoothing, z_loss):
  """Σ mask · (cross entropy with smoothed targets + z_loss · log² Σ e^z).

  Smoothed (Szegedy et al. 2015, sec. 7): the target's probability is 1 - smoothing, and smoothing
  is spread evenly over all tokens, the target's among them; z-loss: Chowdhery et al. 2022, sec. 5.
  """
  total = 0.0
  for row, place in np.ndindex(np.shape(targets_bt)):
    scores = np.asarray(logits_btv[row, place], np.float64)
    log_sum = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    wanted = np.full(len(scores), smoothing / len(scores))
    wanted[targets_bt[row, place]] += 1 - smoothing
    loss = -np.sum(wanted * (scores - log_sum)) + z_loss * log_sum**2
    total += mask_bt[row, place] * loss
  return total
