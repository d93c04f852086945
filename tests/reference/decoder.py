"""Whole models: a dict of arrays by path, a dict of config values and a dict of inputs → logits.

Covers the config space of the library: decoder (with images), encoder, encoder-decoder, vision.
"""

import numpy as np

from tests.reference.experts import moe
from tests.reference.model_layers import (
  ACTIVATION,
  attend,
  biases,
  masks,
  mlp,
  norm,
  rotary,
  sinusoid,
)


def below(weights, place):
  """The weights under a path, their paths cut."""
  return {p[len(place) + 1 :]: a for p, a in weights.items() if p.startswith(f"{place}/")}


def positions_of(tokens, given):
  return np.arange(tokens.shape[1]) + np.zeros_like(tokens) if given is None else given


def projected(x, w, name, letter, cfg, normed):
  """x W + b, normed where queries and keys are: [b, t, heads, h]."""
  y = np.einsum("btd,dkh->btkh", x, w[f"{name}_d{letter}h"]) + w.get(f"{name}_bias_{letter}h", 0.0)
  return norm(y, below(w, f"{name}_norm"), cfg) if normed else y


def latent_attention(x, w, cfg, view):
  """DeepSeek-V2, eq. 9 to 19, a head at a time."""
  positions_bt, see_bts, _, layer = view[:4]
  nope, heads = cfg["attention.latent.nope_dim"], w["key_up_rnh"].shape[1]
  turn = lambda x_bth: rotary(x_bth[:, :, None], positions_bt, cfg, layer == "window")[:, :, 0]  # noqa: E731
  cfg_1e6 = cfg | {"norm.eps": 1e-6}  # of the released code, whatever the other norms have
  c_query = x
  if "query_down_dr" in w:
    c_query = norm(x @ w["query_down_dr"], below(w, "query_norm"), cfg_1e6)
  query = w.get("query_up_rnh", w.get("query_dnh"))
  c = norm(x @ w["latent_dr"], below(w, "latent_norm"), cfg_1e6)
  k_rope = turn(x @ w["key_rope_dh"])
  y = 0.0
  for i in range(heads):
    q = c_query @ query[:, i]
    q = np.concatenate([q[..., :nope], turn(q[..., nope:])], axis=-1)
    k = np.concatenate([c @ w["key_up_rnh"][:, i], k_rope], axis=-1)
    v = c @ w["value_up_rnh"][:, i]
    o = attend(q[:, :, None], k[:, :, None], v[:, :, None], see_bts, cfg)[:, :, 0]
    y = y + o @ w["out_nhd"][i]
  return y


def self_attention(x, w, cfg, view):
  """A row that looks at itself."""
  if "latent_dr" in w:
    return latent_attention(x, w, cfg, view)
  positions_bt, see_bts, bias_bnts, layer = view[:4]
  normed = cfg["attention.qk_norm"] != "none"
  q = projected(x, w, "query", "n", cfg, normed)
  k = projected(x, w, "key", "k", cfg, normed)
  v = projected(x, w, "value", "k", cfg, False)
  if cfg["position.kind"] == "rope":
    q, k = (rotary(a, positions_bt, cfg, layer == "window") for a in (q, k))
  o = attend(q, k, v, see_bts, cfg, bias_bnts, w.get("sinks_n"))
  return np.einsum("btnh,nhd->btd", o, w["out_nhd"]) + w.get("out_bias_d", 0.0)


def cross_attention(x, w, cfg, memory, see_bts):
  """A row that looks at an encoder's result: no positions, no norm of queries, no sinks."""
  q = projected(x, w, "query", "n", cfg, False)
  k = projected(memory, w, "key", "k", cfg, False)
  v = projected(memory, w, "value", "k", cfg, False)
  o = attend(q, k, v, see_bts, cfg)
  return np.einsum("btnh,nhd->btd", o, w["out_nhd"]) + w.get("out_bias_d", 0.0)


def block(x, w, cfg, view, source):
  """One block.

  `view` is (positions, who sees whom, biases, kind of layer, tokens, which are real); `source` is
  (memory, who sees what of it) where there is cross attention.
  """

  def sublayer(name, function):
    place = cfg["norm.place"]
    first = below(w, f"{name}_norm")
    if place == "pre":
      return x + function(norm(x, first, cfg))
    if place == "post":  # Vaswani et al. 2017, sec. 5.4
      return norm(x + function(x), first, cfg)
    if place == "output":  # OLMo 2
      return x + norm(function(x), first, cfg)
    return x + norm(function(norm(x, first, cfg)), below(w, f"{name}_out_norm"), cfg)  # Gemma 2

  def look(y):
    return self_attention(y, below(w, "attention"), cfg, view)

  def feed(y):
    if "mlp/up_df" in w:
      return mlp(y, below(w, "mlp"), cfg)
    return moe(y, below(w, "moe"), cfg, *view[4:])[0]

  if cfg["block"] != "sequential":
    return parallel_block(x, w, cfg, look, feed)
  x = sublayer("attention", look)
  if source is not None:
    x = sublayer("cross", lambda y: cross_attention(y, below(w, "cross_attention"), cfg, *source))
  return sublayer("mlp", feed)


def parallel_block(x, w, cfg, look, feed):
  """GPT-NeoX: x + attention(norm x) + mlp(norm x); GPT-J: one norm for both."""
  for_mlp = "attention_norm" if cfg["block"] == "parallel_shared" else "mlp_norm"
  looked = look(norm(x, below(w, "attention_norm"), cfg))
  fed = feed(norm(x, below(w, for_mlp), cfg))
  if cfg["norm.place"] == "sandwich":
    looked = norm(looked, below(w, "attention_out_norm"), cfg)
    fed = norm(fed, below(w, "mlp_out_norm"), cfg)
  return x + looked + fed


def stack(x, w, cfg, causal, positions, segments, prefix=None, source=None, tokens=None):
  """Blocks one after another, each of its kind in the pattern, and the last norm.

  The first may be dense where the others have experts; they are then a group of their own.
  """
  bias = biases(cfg, causal, positions, w.get("relative_in"))
  see = {
    layer: masks(layer, cfg, causal, positions, segments, prefix)
    for layer in set(cfg["attention.pattern"])
  }
  layers = []
  for group in (below(w, "first"), below(w, "blocks")):
    count = len(group["attention/out_nhd"]) if group else 0
    layers += [{path: array[i] for path, array in group.items()} for i in range(count)]
  for number, own in enumerate(layers):
    layer = cfg["attention.pattern"][number % len(cfg["attention.pattern"])]
    view = (positions, see[layer], bias, layer, tokens, segments > 0)
    x = block(x, own, cfg, view, source)
  if cfg["norm.final"] and cfg["norm.place"] != "post":
    x = norm(x, below(w, "norm"), cfg)
  return x


def embedded(weights, cfg, tokens, positions, types=None, images=None, place="embed"):
  """Vectors of tokens: scaled, an image's in their place, positions and types added, normed."""
  w = below(weights, place)
  x = w["token_vd"][tokens] * cfg["embed.scale"]
  if images is not None:
    for row in range(len(tokens)):
      waiting = iter(images[row])
      for place, token in enumerate(tokens[row]):
        if token == cfg["vision.image_token"]:
          x[row, place] = next(waiting)
  if cfg["position.kind"] == "learned":
    x = x + w["position_td"][positions]
  if cfg["position.kind"].startswith("sinusoidal"):
    x = x + np.array([[sinusoid(p, x.shape[-1], cfg) for p in row] for row in positions])
  if cfg["embed.types"]:
    x = x + w["type_id"][np.zeros_like(tokens) if types is None else types]
  return norm(x, below(w, "norm"), cfg) if cfg["embed.norm"] else x


def scored(weights, cfg, x):
  """Logits of every token."""
  w = below(weights, "embed")
  logits = x @ (w["token_vd"].T if cfg["tie_embeddings"] else w["head_dv"])
  logits = logits * cfg["embed.logit_scale"] + w.get("head_bias_v", 0.0)
  cap = cfg["embed.logit_softcap"]
  return cap * np.tanh(logits / cap) if cap else logits


def logits(weights, cfg, batch):
  """Runs a whole model of any kind.

  `weights` by path (`embed/token_vd`, `decoder/blocks/mlp/up_df` stacked over layers …); `cfg` by
  dotted key; `batch` a dict: tokens, segments, positions, prefix, types, source, source_segments,
  source_positions, patches, each an array or absent.
  """
  if cfg["kind"] == "vision":
    x = tower(below(weights, "vision"), cfg, batch["patches"])
    x = x[:, 0] if cfg["vision.class_token"] else x.mean(1)
    return (x @ weights["head/head_dv"] + weights["head/head_bias_v"])[:, None]
  if cfg["kind"] == "encoder":
    return scored(weights, cfg, masked_token_head(weights, cfg, features(weights, cfg, batch)))
  return scored(weights, cfg, decoded(weights, cfg, batch))


def decoded(weights, cfg, batch):
  """The decoder's residual stream after its last norm."""
  tokens = batch["tokens"]
  positions = positions_of(tokens, batch.get("positions"))
  segments = batch.get("segments", np.ones_like(tokens))
  source = None
  if cfg["kind"] == "encoder_decoder":
    source = read_source(weights, cfg, batch, segments)
  images = None
  if cfg["vision.image_size"]:
    images = pictures(weights, cfg, batch["patches"])
  x = embedded(weights, cfg, tokens, positions, batch.get("types"), images)
  prefix = batch.get("prefix") if cfg["attention.mask"] == "prefix" else None
  causal = cfg["attention.mask"] != "bidirectional"
  w = below(weights, "decoder")
  return stack(x, w, cfg, causal, positions, segments, prefix, source, tokens)


def read_source(weights, cfg, batch, segments):
  """(an encoder's result, who of the target sees what of it): Raffel et al. 2019, sec. 2.1."""
  tokens = batch["source"]
  positions = positions_of(tokens, batch.get("source_positions"))
  numbers = batch.get("source_segments", np.ones_like(tokens))
  own = "source_embed" if cfg["source_vocab_size"] else "embed"
  x = embedded(weights, cfg, tokens, positions, place=own)
  x = stack(x, below(weights, "encoder"), cfg, False, positions, numbers)
  return x, segments[:, :, None] == numbers[:, None, :]


def features(weights, cfg, batch):
  """An encoder's residual stream after its last block: Devlin et al. 2018."""
  tokens = batch["tokens"]
  positions = positions_of(tokens, batch.get("positions"))
  segments = batch.get("segments", np.ones_like(tokens))
  x = embedded(weights, cfg, tokens, positions, batch.get("types"))
  causal = cfg["attention.mask"] in ("causal", "prefix")
  prefix = batch.get("prefix") if cfg["attention.mask"] == "prefix" else None
  w = below(weights, "encoder")
  return stack(x, w, cfg, causal, positions, segments, prefix, tokens=tokens)


def masked_token_head(weights, cfg, x):
  """BERT's transform before the output matrix."""
  x = ACTIVATION["gelu"](x @ weights["transform_id"] + weights["transform_bias_d"])
  return norm(x, below(weights, "transform_norm"), cfg)


def pooled(weights, x, segments, how):
  """One vector of a text; padding (segment 0) is left out of mean and max."""
  if how == "cls":
    return x[:, 0]
  if how == "pooler":
    return np.tanh(x[:, 0] @ weights["pooler_id"] + weights["pooler_bias_d"])
  over = {
    "mean": lambda row: row.mean(0),
    "max": lambda row: row.max(0),
    "mean_sqrt_len_tokens": lambda row: row.sum(0) / len(row) ** 0.5,
    "weightedmean": lambda row: np.average(row, axis=0, weights=1 + np.arange(len(row))),
    "lasttoken": lambda row: row[-1],
  }[how]
  return np.array([over(row[real > 0]) for row, real in zip(x, segments, strict=True)])


def tower(w, cfg, patches):
  """Dosovitskiy et al. 2020, eq. 1 to 4: [images, (class and) patches, d]."""
  x = patches @ w["patch_id"] + w.get("patch_bias_d", 0.0)
  if cfg["vision.class_token"]:
    x = np.array([np.vstack([w["class_d"], image]) for image in x])
  x = x + w["position_td"]
  if cfg["embed.norm"]:
    x = norm(x, below(w, "input_norm"), cfg)
  places = np.arange(x.shape[1]) + np.zeros(x.shape[:2], int)
  return stack(x, below(w, "encoder"), cfg, False, places, np.ones_like(places))


def pictures(weights, cfg, patches):
  """LLaVA 1.5: patches' vectors of a CLIP-type tower, through two layers; one list a row."""
  own = cfg | {
    "heads": cfg["vision.heads"],
    "activation": cfg["vision.activation"],
    "block": "sequential",
    "embed.norm": cfg["vision.input_norm"],
    "norm.kind": "layer",
    "norm.place": "pre",
    "norm.final": False,
    "norm.eps": cfg["vision.eps"],
    "position.kind": "learned",
    "attention.pattern": ("full",),
    "attention.qk_norm": "none",
    "attention.softcap": 0.0,
    "attention.scale": 0.0,
  }
  each = (cfg["vision.image_size"] // cfg["vision.patch"]) ** 2
  rows = []
  for row in patches:
    made = tower(below(weights, "vision"), own, row.reshape(-1, each, row.shape[-1]))
    x = np.concatenate(list(made[:, 1:] if cfg["vision.class_token"] else made))
    x = ACTIVATION["gelu"](x @ weights["projector/up_if"] + weights["projector/up_bias_f"])
    rows.append(x @ weights["projector/down_fd"] + weights["projector/down_bias_d"])
  return rows
