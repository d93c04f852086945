"""Cross entropy, one position after another."""

import numpy as np


def cross_entropy(logits_btv, targets_bt, mask_bt):
  """Σ mask · -log(e^z_target / Σ e^z) and Σ mask."""
  total, count = 0.0, 0.0
  for row, place in np.ndindex(np.shape(targets_bt)):
    scores = logits_btv[row, place] - logits_btv[row, place].max()
    log_p = scores[targets_bt[row, place]] - np.log(np.exp(scores).sum())
    total -= mask_bt[row, place] * log_p
    count += mask_bt[row, place]
  return total, count
