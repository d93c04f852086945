"""Routers: which experts a token goes to and with what weights, and sums that say how evenly.

Pure functions in fp32. What cannot be chosen (padding, a token over capacity) goes to expert number
e, which does not exist. Every term is a sum over tokens beside their count, so that micro-batches
add up and are divided once.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterAssignment:
  """Where tokens go.

  Attributes:
    experts_btj: int32; e where a token's j-th place is empty.
    weights_btj: fp32 factors on what the experts return.
  """

  experts_btj: jax.Array
  weights_btj: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
  """What a layer's router did, as fp32 sums over tokens; stacked over layers with a leading `l`.

  Attributes:
    tokens: how many.
    load_e: places that tokens wanted at each expert.
    dropped: places refused for capacity.
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


def route(
  config, logits_bte, real_bt, bias_e=None
) -> tuple[RouterAssignment, RouterStats]:
  """Sends tokens to experts by their scores.

  Args:
    config: the router.
    logits_bte: fp32 scores, noise added.
    real_bt: bool, False for padding.
    bias_e: added where experts are picked, not where they are weighted.
  Returns:
    (`RouterAssignment`, `RouterStats`).
  """
  sigmoid = config.router == "sigmoid"
  scores_bte = jax.nn.sigmoid(logits_bte) if sigmoid else jax.nn.softmax(logits_bte)
  # What is divided by a sum is a softmax of logarithms: scores may be as small as they like.
  log_bte = jax.nn.log_sigmoid(logits_bte) if sigmoid else logits_bte
  if config.router == "expert_choice":
    routes = _experts_choose(config, scores_bte, real_bt)
  else:
    routes = _tokens_choose(config, scores_bte, log_bte, bias_e)
  wanted = _mask(routes, real_bt, config.experts)
  kept = wanted if config.router == "expert_choice" else _within_capacity(config, wanted, real_bt)
  share_bte = jax.nn.softmax(log_bte) if sigmoid else scores_bte
  return kept, _stats(config, wanted, kept, share_bte, logits_bte, real_bt)


def hashed(config, tokens_bt, real_bt) -> tuple[RouterAssignment, RouterStats]:
  """Sends each id to experts of its own, whatever it means.

  Source: Roller et al. 2021, arXiv:2106.04426, sec. 3 (random hash).
  """
  mixed_bt = (tokens_bt.astype(jnp.uint32) + 1) * jnp.uint32(2654435761)  # Knuth's multiplier
  first_bt = (mixed_bt >> 16) % config.experts
  experts_btj = (first_bt[..., None] + jnp.arange(config.top_k)) % config.experts
  weights_btj = jnp.full(experts_btj.shape, config.scale / config.top_k, jnp.float32)
  assigned = RouterAssignment(experts_btj.astype(jnp.int32), weights_btj)
  wanted = _mask(assigned, real_bt, config.experts)
  kept = _within_capacity(config, wanted, real_bt)
  even_bte = jnp.full((*tokens_bt.shape, config.experts), 1 / config.experts)
  return kept, _stats(config, wanted, kept, even_bte, jnp.zeros_like(even_bte), real_bt)


def _tokens_choose(config, scores_bte, log_bte, bias_e) -> RouterAssignment:
  """Source: top k: Shazeer et al. 2017, arXiv:1701.06538, sec. 2.1; sigmoid, bias and groups:
  DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2."""
  wanted_bte = jax.lax.stop_gradient(scores_bte)
  if bias_e is not None:
    wanted_bte = wanted_bte + jax.lax.stop_gradient(bias_e)
  if config.groups > 1:
    wanted_bte = _in_best_groups(config, wanted_bte)
  experts_btj = jax.lax.top_k(wanted_bte, config.top_k)[1]
  if config.renormalize:
    weights_btj = jax.nn.softmax(jnp.take_along_axis(log_bte, experts_btj, axis=-1))
  else:
    weights_btj = jnp.take_along_axis(scores_bte, experts_btj, axis=-1)
  return RouterAssignment(experts_btj, config.scale * weights_btj)


def _in_best_groups(config, wanted_bte):
  """Leaves the best groups' scores; a group is as good as its best expert (softmax, DeepSeek-V2) or
  its best two together (sigmoid, DeepSeek-V3)."""
  b, t, e = wanted_bte.shape
  grouped = wanted_bte.reshape(b, t, config.groups, e // config.groups)
  best = min(2 if config.router == "sigmoid" else 1, e // config.groups)
  worth = jax.lax.top_k(grouped, best)[0].sum(-1)
  chosen = jax.lax.top_k(worth, config.top_groups)[1]
  here = (chosen[..., None] == jnp.arange(config.groups)).any(-2)
  return jnp.where(here[..., None], grouped, -jnp.inf).reshape(b, t, e)


def _experts_choose(config, scores_bte, real_bt) -> RouterAssignment:
  """Each expert takes the tokens of a row that score highest with it.

  Source: Zhou et al. 2022, arXiv:2202.09368, sec. 3.2. A token's experts depend on later tokens.
  """
  e = config.experts
  slots_b11 = config.slots_of(real_bt)[:, None, None]
  scored_bet = jnp.where(real_bt[:, None], _coarse(scores_bte.swapaxes(1, 2)), -1.0)
  best_bec = jax.lax.top_k(scored_bet, config.slots(scores_bte.shape[1]))[0]
  worst_be1 = jnp.take_along_axis(best_bec, jnp.maximum(slots_b11 - 1, 0), axis=-1)
  # Of equal scores at the border the first tokens are taken, as top_k does.
  above, equal = scored_bet > worst_be1, scored_bet == worst_be1
  room = slots_b11 - above.sum(-1, keepdims=True)
  taken_bte = (above | (equal & (jnp.cumsum(equal, -1) <= room))).swapaxes(1, 2)
  numbers_e = jnp.arange(e, dtype=jnp.int32)
  return RouterAssignment(jnp.where(taken_bte, numbers_e, e), config.scale * scores_bte)


def _mask(routes: RouterAssignment, real_bt, e: int) -> RouterAssignment:
  """Sends padding nowhere."""
  experts_btj = jnp.where(real_bt[..., None], routes.experts_btj, e)
  return RouterAssignment(experts_btj, jnp.where(experts_btj < e, routes.weights_btj, 0))


def _within_capacity(config, routes: RouterAssignment, real_bt) -> RouterAssignment:
  """Takes places away from tokens that an expert of their row has no room for.

  Source: capacity: Lepikhin et al. 2020, arXiv:2006.16668, alg. 1, with a row as the group;
  by weight: Riquelme et al. 2021, arXiv:2106.05974, sec. 4.1.
  """
  b, t, j = routes.experts_btj.shape
  if not config.slots(t):
    return routes
  order_bi = jnp.arange(j * t)[None].repeat(b, 0)
  experts_bi = routes.experts_btj.swapaxes(1, 2).reshape(b, j * t)  # first choices first
  if config.drop == "lightest":
    weights_bi = routes.weights_btj.swapaxes(1, 2).reshape(b, j * t)
    order_bi = jnp.argsort(-_coarse(weights_bi), axis=1, stable=True)
  sorted_bi = jnp.take_along_axis(experts_bi, order_bi, axis=1)
  here_bie = sorted_bi[..., None] == jnp.arange(config.experts)
  slots_b11 = config.slots_of(real_bt)[:, None, None]
  fits_bi = ((jnp.cumsum(here_bie, axis=1) <= slots_b11) & here_bie).any(-1)
  fits_bi = jnp.take_along_axis(fits_bi, jnp.argsort(order_bi, axis=1), axis=1)
  fits_btj = fits_bi.reshape(b, j, t).swapaxes(1, 2)
  return RouterAssignment(
    jnp.where(fits_btj, routes.experts_btj, config.experts),
    jnp.where(fits_btj, routes.weights_btj, 0),
  )


def _coarse(values):
  """Rounds what tokens are compared by to 11 bits.

  Alike tokens (first ones of documents, say) then stay equal, and in their order, however a mesh
  rounds.
  """
  return jax.lax.reduce_precision(jax.lax.stop_gradient(values), exponent_bits=8, mantissa_bits=10)


def _stats(
  config, wanted: RouterAssignment, kept: RouterAssignment, share_bte, logits_bte, real_bt
) -> RouterStats:
  """Source: balance: Fedus et al. 2021, arXiv:2101.03961, eq. 4, over a token's top k as in
  DeepSeek-V3, eq. 17 to 20 (1 where load is even); z: Zoph et al. 2022, arXiv:2202.08906, eq. 5."""
  e = config.experts
  places_be = (wanted.experts_btj[..., None] == jnp.arange(e)).sum((1, 2)).astype(jnp.float32)
  real_bt1 = real_bt[..., None].astype(jnp.float32)
  shares_be = (share_bte * real_bt1).sum(1)

  def even(places, shares):  # e · Σ (share of places) · (mean probability) · tokens
    return e * jnp.sum(places / jnp.maximum(places.sum(-1, keepdims=True), 1) * shares, -1)

  log_bte = jnp.log(jnp.maximum(share_bte, 1e-30))
  log_sum_bt1 = jax.nn.logsumexp(logits_bte, axis=-1, keepdims=True)
  return RouterStats(
    tokens=real_bt1.sum(),
    load_e=places_be.sum(0),
    dropped=((wanted.experts_btj < e) & (kept.experts_btj == e)).sum().astype(jnp.float32),
    entropy=jax.lax.stop_gradient(-jnp.sum(share_bte * log_bte * real_bt1)),
    balance=even(places_be.sum(0), shares_be.sum(0)),
    sequence=even(places_be, shares_be).sum(),
    z=jnp.sum(jnp.square(log_sum_bt1) * real_bt1),
  )
