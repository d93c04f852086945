"""Mixture of experts from the papers, in float64: one token, one expert and one place at a time.

A row's routes are a list with a list for each token: its (expert, weight) pairs, best first. `cfg`
is a plain dict of a model's config values by dotted key (`moe.top_k`, `activation` …).
"""

import math

import numpy as np

from tests.reference.model_layers import mlp


def scored(logits, router):
  """Scores of one token: probabilities (Shazeer et al. 2017, eq. 2), or sigmoids (DeepSeek-V3)."""
  if router == "sigmoid":
    return [1 / (1 + math.exp(-z)) for z in logits]
  total = sum(math.exp(z) for z in logits)
  return [math.exp(z) / total for z in logits]


def best(numbers, values, count):
  """As many of `numbers` as have the highest values, best first; of equals the first."""
  return sorted(numbers, key=lambda number: (-values[number], number))[:count]


def coarse(value):
  """The nearest number of 11 bits: tokens are compared by no more, so that alike ones are equal."""
  part, power = math.frexp(value)
  return math.ldexp(round(part * 2**11), power - 11)


def chosen(scores, cfg, bias=None):
  """One token's experts, best first: DeepSeek-V3, eq. 16, and its limit on nodes, sec. 2.1.2.

  A group is worth its best expert (DeepSeek-V2, sec. 2.2.2) where scores are a softmax, its best
  two together where they are sigmoids.
  """
  wanted = [s + (0.0 if bias is None else bias[i]) for i, s in enumerate(scores)]
  size = len(scores) // cfg["moe.groups"]
  worth = []
  for group in range(cfg["moe.groups"]):
    inside = sorted(wanted[group * size : (group + 1) * size], reverse=True)
    worth.append(sum(inside[: 2 if cfg["moe.router"] == "sigmoid" else 1]))
  groups = best(range(cfg["moe.groups"]), worth, cfg["moe.top_groups"])
  allowed = [i for i in range(len(scores)) if i // size in groups]
  return best(allowed, wanted, cfg["moe.top_k"])


def weighed(scores, experts, cfg):
  """[(expert, weight)]: a share of what the chosen have (eq. 13 of DeepSeek-V3), or their own."""
  total = sum(scores[i] for i in experts) if cfg["moe.renormalize"] else 1.0
  return [(i, cfg["moe.scale"] * scores[i] / total) for i in experts]


def slots(cfg, length):
  """Tokens of a row that an expert takes; its even share is (real tokens) · top_k / experts."""
  factor = cfg["moe.capacity"]
  if cfg["moe.router"] == "expert_choice" and not factor:
    factor = 1.0
  if not factor:
    return length * cfg["moe.top_k"]
  return min(length, math.ceil(factor * length * cfg["moe.top_k"] / cfg["moe.experts"]))


def picked_by_experts(scores_te, real_t, cfg):
  """Each expert takes the tokens that score highest with it: Zhou et al. 2022, sec. 3.2."""
  routes = [[] for _ in scores_te]
  tokens = [place for place in range(len(scores_te)) if real_t[place]]
  for expert in range(cfg["moe.experts"]):
    values = {place: coarse(scores_te[place][expert]) for place in tokens}
    for place in best(tokens, values, slots(cfg, len(tokens))):
      routes[place].append((expert, cfg["moe.scale"] * scores_te[place][expert]))
  return routes


def hashed(token, cfg):
  """An id's experts: its product with Knuth's multiplier in 32 bits, the upper half of it."""
  first = (((int(token) + 1) * 2654435761) % 2**32 >> 16) % cfg["moe.experts"]
  return [
    ((first + i) % cfg["moe.experts"], cfg["moe.scale"] / cfg["moe.top_k"])
    for i in range(cfg["moe.top_k"])
  ]


def within_capacity(routes, cfg, tokens):
  """Fills experts up, one place after another: Lepikhin et al. 2020, alg. 1.

  There are `tokens` in the row beside its padding. First all first choices in the order of the row,
  then all second ones; or (`lightest`) heavy weights first, Riquelme et al. 2021, sec. 4.1.
  """
  places = [(j, t) for j in range(cfg["moe.top_k"]) for t in range(len(routes))]
  places = [(j, t) for j, t in places if j < len(routes[t])]
  if cfg["moe.drop"] == "lightest":
    places.sort(key=lambda place: -coarse(routes[place[1]][place[0]][1]))
  room = [slots(cfg, tokens)] * cfg["moe.experts"]
  kept = [[] for _ in routes]
  for j, t in places:
    expert, weight = routes[t][j]
    if room[expert]:
      room[expert] -= 1
      kept[t].append((expert, weight))
  return kept


def routed(logits_bte, cfg, tokens_bt, real_bt, bias=None):
  """Routes of all rows: (wanted, kept within capacity, each token's distribution)."""
  wanted, kept, shares = [], [], []
  for row in range(len(real_bt)):
    if cfg["moe.router"] == "hash":
      routes = [hashed(token, cfg) for token in tokens_bt[row]]
      shares.append([[1 / cfg["moe.experts"]] * cfg["moe.experts"]] * len(routes))
    else:
      scores = [scored(logits, cfg["moe.router"]) for logits in logits_bte[row]]
      shares.append([[s / sum(token) for s in token] for token in scores])
      if cfg["moe.router"] != "expert_choice":
        routes = [weighed(token, chosen(token, cfg, bias), cfg) for token in scores]
    if cfg["moe.router"] == "expert_choice":
      wanted.append(picked_by_experts(scores, real_bt[row], cfg))
      kept.append(wanted[-1])
    else:
      wanted.append([routes[t] if real_bt[row][t] else [] for t in range(len(routes))])
      kept.append(within_capacity(wanted[-1], cfg, sum(map(bool, real_bt[row]))))
  return wanted, kept, np.array(shares)


def evenness(routes, shares_te, e):
  """e · Σ f_i P_i of some tokens: Fedus et al. 2021, eq. 4 to 6, over all places of a token."""
  places = [expert for token in routes for expert, _ in token]
  loss = 0.0
  for expert in range(e):
    share = places.count(expert) / max(len(places), 1)
    loss += e * share * np.mean([token[expert] for token in shares_te])
  return loss


def terms(wanted, kept, shares_bte, logits_bte, real_bt, e):
  """What a layer's router did: sums over its real tokens, by name."""
  real = [(b, t) for b, t in np.ndindex(np.shape(real_bt)) if real_bt[b][t]]
  load = [0] * e
  for b, t in real:
    for expert, _ in wanted[b][t]:
      load[expert] += 1
  made = {"tokens": len(real), "load_e": load}
  made["dropped"] = sum(len(wanted[b][t]) - len(kept[b][t]) for b, t in real)
  made["entropy"] = -sum(p * math.log(p) for b, t in real for p in shares_bte[b][t])
  tokens = [wanted[b][t] for b, t in real]
  made["balance"] = len(real) * evenness(tokens, [shares_bte[b][t] for b, t in real], e)
  made["sequence"] = 0.0  # DeepSeek-V3, eq. 17 to 20
  for row in range(len(real_bt)):
    own = [t for b, t in real if b == row]
    if own:
      shares = [shares_bte[row][t] for t in own]
      made["sequence"] += len(own) * evenness([wanted[row][t] for t in own], shares, e)
  # Zoph et al. 2022, eq. 5.
  made["z"] = sum(math.log(sum(math.exp(z) for z in logits_bte[b][t])) ** 2 for b, t in real)
  return made


def moe(x_btd, w, cfg, tokens_bt, real_bt):
  """Shazeer et al. 2017, eq. 1, and shared experts (Dai et al. 2024, eq. 9): (y_btd, terms)."""
  e = cfg["moe.experts"]
  hash_router = cfg["moe.router"] == "hash"
  logits_bte = np.zeros((*x_btd.shape[:2], e)) if hash_router else x_btd @ w["router_de"]
  wanted, kept, shares = routed(logits_bte, cfg, tokens_bt, real_bt, w.get("bias_e"))
  y_btd = np.zeros_like(x_btd)
  for b, t in np.ndindex(x_btd.shape[:2]):
    for expert, weight in kept[b][t]:
      own = {"up_df": w["up_edf"][expert], "down_fd": w["down_efd"][expert]}
      if "gate_edf" in w:
        own["gate_df"] = w["gate_edf"][expert]
      y_btd[b, t] += weight * mlp(x_btd[b, t], own, cfg)
  if cfg["moe.shared"]:
    names = ("gate_df", "up_df", "down_fd")
    shared = {name: w[f"shared/{name}"] for name in names if f"shared/{name}" in w}
    y_btd = y_btd + mlp(x_btd, shared, cfg)
  return y_btd, terms(wanted, kept, shares, logits_bte, real_bt, e)
