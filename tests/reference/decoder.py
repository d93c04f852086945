"""A whole Llama-type decoder: a dict of arrays in, logits out."""

import numpy as np

from tests.reference.layers import attention_layer, rms_norm, swiglu


def decoder(weights, tokens_bt, segments_bt, positions_bt, *, theta, eps):
  """Scores the next token at every position.

  `weights` is keyed by path (`embed/token_vd`, `blocks/mlp/up_df` stacked over layers …); without
  `embed/head_dv` the head is the transposed embedding.
  """
  embedding = weights["embed/token_vd"]
  x = np.stack([np.stack([embedding[token] for token in row]) for row in tokens_bt])
  for layer in range(len(weights["blocks/mlp/up_df"])):
    w = {
      path.removeprefix("blocks/"): array[layer]
      for path, array in weights.items()
      if path.startswith("blocks/")
    }
    attention_weights = {
      name: w[f"attention/{name}"] for name in ("query_dnh", "key_dkh", "value_dkh", "out_nhd")
    }
    normed = rms_norm(x, w["attention_norm/scale_d"], eps)
    x = x + attention_layer(normed, attention_weights, segments_bt, positions_bt, theta)
    normed = rms_norm(x, w["mlp_norm/scale_d"], eps)
    x = x + swiglu(normed, w["mlp/gate_df"], w["mlp/up_df"], w["mlp/down_fd"])
  x = rms_norm(x, weights["norm/scale_d"], eps)
  return x @ weights.get("embed/head_dv", embedding.T)
