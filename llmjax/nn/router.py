"""Routers in fp32: which experts a token goes to and with which weights, and load statistics.
Padding and tokens over capacity go to expert number e, which does not exist. Statistics are sums
over tokens beside their count, so that micro-batches add up and are divided once."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterAssignment:
  """The experts of every token.

  Attributes:
    experts_btj: int32; e where a token has no j-th expert.
    weights_btj: fp32 factors on the experts' results.
  """

  experts_btj: jax.Array
  weights_btj: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
  """A router's fp32 sums over tokens; stacked over layers with a leading `l`.

  Attributes:
    tokens: how many.
    load_e: (token, choice) pairs that chose each expert.
    dropped: pairs that were over capacity.
    entropy: of the router's distribution, in nats.
    balance: Switch loss of the batch, times tokens.
    sequence: the same of each row, times its tokens.
    z: squared log of the softmax's sum.
  """

  tokens: jax.Array
  load_e: jax.Array
  dropped: jax.Array
  entropy: jax.Array
  balance: jax.Array
  sequence: jax.Array
  z: jax.Array


def route(config, logits_bte, real_bt, bias_e=None) -> tuple[RouterAssignment, RouterStats]:
  """Sends tokens to experts by their scores.

  Args:
    logits_bte: fp32 scores, noise added.
    bias_e: added where experts are chosen, not where they are weighted.
  """
  sigmoid = config.router == "sigmoid"
  scores_bte = jax.nn.sigmoid(logits_bte) if sigmoid else jax.nn.softmax(logits_bte)
  # What is divided by a sum is a softmax of logarithms: scores may be as small as they like.
  log_bte = jax.nn.log_sigmoid(logits_bte) if sigmoid else logits_bte
  if config.router == "expert_choice":
    chosen = _experts_choose(config, scores_bte, real_bt)
  else:
    chosen = _tokens_choose(config, scores_bte, log_bte, bias_e)
  share_bte = jax.nn.softmax(log_bte) if sigmoid else scores_bte
  return _drop(config, chosen, share_bte, logits_bte, real_bt)


def hashed(config, tokens_bt, real_bt) -> tuple[RouterAssignment, RouterStats]:
  """Sends tokens to experts by a hash of their ids.

  Source: Roller et al. 2021, arXiv:2106.04426, sec. 3 (random hash).
  """
  mixed_bt = (tokens_bt.astype(jnp.uint32) + 1) * jnp.uint32(2654435761)  # Knuth's multiplier
  first_bt = (mixed_bt >> 16) % config.experts
  experts_btj = (first_bt[..., None] + jnp.arange(config.top_k)) % config.experts
  weights_btj = jnp.full(experts_btj.shape, config.scale / config.top_k, jnp.float32)
  chosen = RouterAssignment(experts_btj.astype(jnp.int32), weights_btj)
  even_bte = jnp.full((*tokens_bt.shape, config.experts), 1 / config.experts)
  return _drop(config, chosen, even_bte, jnp.zeros_like(even_bte), real_bt)


def _drop(config, chosen: RouterAssignment, share_bte, logits_bte, real_bt) -> tuple:
  """Drops padding, then what is over capacity: (what is left, `RouterStats`)."""
  chosen = _keep(chosen, real_bt[..., None], config.experts)
  kept = chosen if config.router == "expert_choice" else _within_capacity(config, chosen, real_bt)
  return kept, _stats(config, chosen, kept, share_bte, logits_bte, real_bt)


def _keep(assigned: RouterAssignment, kept, e: int) -> RouterAssignment:
  experts_btj = jnp.where(kept, assigned.experts_btj, e)
  return RouterAssignment(experts_btj, jnp.where(experts_btj < e, assigned.weights_btj, 0))


def _tokens_choose(config, scores_bte, log_bte, bias_e) -> RouterAssignment:
  """Source: top k: Shazeer et al. 2017, arXiv:1701.06538, sec. 2.1; sigmoid, bias and groups:
  DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2."""
  ranked_bte = jax.lax.stop_gradient(scores_bte)
  if bias_e is not None:
    ranked_bte = ranked_bte + jax.lax.stop_gradient(bias_e)
  if config.groups > 1:
    ranked_bte = _in_best_groups(config, ranked_bte)
  experts_btj = jax.lax.top_k(ranked_bte, config.top_k)[1]
  if config.renormalize:
    weights_btj = jax.nn.softmax(jnp.take_along_axis(log_bte, experts_btj, axis=-1))
  else:
    weights_btj = jnp.take_along_axis(scores_bte, experts_btj, axis=-1)
  return RouterAssignment(experts_btj, config.scale * weights_btj)


def _in_best_groups(config, scores_bte):
  """Masks the scores outside the best groups, ranked by their best expert (softmax, DeepSeek-V2) or
  by the sum of their best two (sigmoid, DeepSeek-V3)."""
  b, t, e = scores_bte.shape
  grouped = scores_bte.reshape(b, t, config.groups, e // config.groups)
  best = min(2 if config.router == "sigmoid" else 1, e // config.groups)
  group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
  chosen = jax.lax.top_k(group_scores, config.top_groups)[1]
  is_chosen = (chosen[..., None] == jnp.arange(config.groups)).any(-2)
  return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(b, t, e)


def _experts_choose(config, scores_bte, real_bt) -> RouterAssignment:
  """Source: Zhou et al. 2022, arXiv:2202.09368, sec. 3.2, with a row as the group."""
  e = config.experts
  slots_b11 = config.slots_of(real_bt)[:, None, None]
  scored_bet = jnp.where(real_bt[:, None], _coarse(scores_bte.swapaxes(1, 2)), -1.0)
  best_bec = jax.lax.top_k(scored_bet, config.slots(scores_bte.shape[1]))[0]
  worst_be1 = jnp.take_along_axis(best_bec, jnp.maximum(slots_b11 - 1, 0), axis=-1)
  # Of equal scores at the border the first tokens are taken, as top_k does.
  above, equal = scored_bet > worst_be1, scored_bet == worst_be1
  slots_left = slots_b11 - above.sum(-1, keepdims=True)
  taken_bte = (above | (equal & (jnp.cumsum(equal, -1) <= slots_left))).swapaxes(1, 2)
  numbers_e = jnp.arange(e, dtype=jnp.int32)
  return RouterAssignment(jnp.where(taken_bte, numbers_e, e), config.scale * scores_bte)


def _within_capacity(config, chosen: RouterAssignment, real_bt) -> RouterAssignment:
  """Source: Lepikhin et al. 2020, arXiv:2006.16668, alg. 1, with a row as the group; by weight:
  Riquelme et al. 2021, arXiv:2106.05974, sec. 4.1."""
  b, t, j = chosen.experts_btj.shape
  if not config.slots(t):
    return chosen
  order_bi = jnp.arange(j * t)[None].repeat(b, 0)
  experts_bi = chosen.experts_btj.swapaxes(1, 2).reshape(b, j * t)  # first choices first
  if config.drop == "lightest":
    weights_bi = chosen.weights_btj.swapaxes(1, 2).reshape(b, j * t)
    order_bi = jnp.argsort(-_coarse(weights_bi), axis=1, stable=True)
  sorted_bi = jnp.take_along_axis(experts_bi, order_bi, axis=1)
  onehot_bie = sorted_bi[..., None] == jnp.arange(config.experts)
  slots_b11 = config.slots_of(real_bt)[:, None, None]
  fits_bi = ((jnp.cumsum(onehot_bie, axis=1) <= slots_b11) & onehot_bie).any(-1)
  fits_bi = jnp.take_along_axis(fits_bi, jnp.argsort(order_bi, axis=1), axis=1)
  return _keep(chosen, fits_bi.reshape(b, j, t).swapaxes(1, 2), config.experts)


def _coarse(values):
  """Rounds to 11 bits, so that equal tokens tie, and keep their order, however a mesh rounds."""
  return jax.lax.reduce_precision(jax.lax.stop_gradient(values), exponent_bits=8, mantissa_bits=10)


def _stats(config, chosen, kept, share_bte, logits_bte, real_bt) -> RouterStats:
  """Source: balance: Fedus et al. 2021, arXiv:2101.03961, eq. 4, over a token's top k as in
  DeepSeek-V3, eq. 17 to 20 (1 where load is even); z: Zoph et al. 2022, arXiv:2202.08906, eq. 5."""
  e = config.experts
  load_be = (chosen.experts_btj[..., None] == jnp.arange(e)).sum((1, 2)).astype(jnp.float32)
  real_bt1 = real_bt[..., None].astype(jnp.float32)
  shares_be = (share_bte * real_bt1).sum(1)

  def balance(load, shares):  # e · Σ (share of load) · (mean probability) · tokens
    return e * jnp.sum(load / jnp.maximum(load.sum(-1, keepdims=True), 1) * shares, -1)

  log_bte = jnp.log(jnp.maximum(share_bte, 1e-30))
  log_sum_bt1 = jax.nn.logsumexp(logits_bte, axis=-1, keepdims=True)
  return RouterStats(
    tokens=real_bt1.sum(),
    load_e=load_be.sum(0),
    dropped=((chosen.experts_btj < e) & (kept.experts_btj == e)).sum().astype(jnp.float32),
    entropy=jax.lax.stop_gradient(-jnp.sum(share_bte * log_bte * real_bt1)),
    balance=balance(load_be.sum(0), shares_be.sum(0)),
    sequence=balance(load_be, shares_be).sum(),
    z=jnp.sum(jnp.square(log_sum_bt1) * real_bt1),
  )
