"""The compiled part of generation: prompts read into a cache, then a token of every row at a time.

The state is a dict of arrays, which `begin` makes and `go_on` takes and returns: the cache, what
rows have written, how many tokens, and which have ended.
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.data.batch import Batch
from llmjax.serve.sample import draw, penalize


def prefill(model, batch: Batch, lengths, slots: int):
  """Reads prompts into a new cache: (logits_bv after each row's last token, cache)."""
  x_btd, cache, _ = model.hidden(batch, model.init_cache(batch, slots))
  last_btd = x_btd[jnp.arange(len(lengths)), lengths - 1][:, None]
  return model.logits(last_btd)[:, 0], cache


def decode(model, batch: Batch, cache):
  """Reads one more token of every row: (logits_bv after it, cache)."""
  x_btd, cache, _ = model.hidden(batch, cache)
  return model.logits(x_btd)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("top_k", "slots"))
def begin(model, batch, lengths, knobs, top_k, slots):
  """Fills the cache with the prompts and draws every row's first token: the state of the loop."""
  logits_bv, cache = prefill(model, batch, lengths, slots)
  state = {
    "cache": cache.squeeze(),
    "done": jnp.int32(0),
    "out": jnp.zeros((len(lengths), slots), jnp.int32),
    "counts": jnp.zeros(len(lengths), jnp.int32),
    "ended": jnp.zeros(len(lengths), bool),
  }
  if "penalty" in knobs:
    rows = jnp.arange(len(lengths))[:, None]
    state["seen"] = jnp.zeros(logits_bv.shape, bool).at[rows, batch.tokens_bt].max(batch.prefix_bt)
  return _drawn(state, logits_bv, knobs, top_k)


def _drawn(state, logits_bv, knobs, top_k) -> dict:
  """The state with one more token of every row that has not ended."""
  seen_bv, done = state.get("seen"), state["done"]
  if seen_bv is not None:
    logits_bv = penalize(logits_bv, seen_bv, knobs["penalty"])
  key = jax.random.fold_in(knobs["key"], done)
  token_b = draw(key, logits_bv, knobs["temperature"], top_k, knobs["top_p"], knobs["min_p"])
  state |= {
    "done": done + 1,
    "out": jax.lax.dynamic_update_index_in_dim(state["out"], token_b, done, axis=1),
    "counts": state["counts"] + ~state["ended"],
    "ended": state["ended"] | (token_b[:, None] == knobs["ends"]).any(axis=1),
  }
  if seen_bv is not None:
    state["seen"] = seen_bv.at[jnp.arange(len(token_b)), token_b].set(True)
  return state


@functools.partial(jax.jit, static_argnames="top_k", donate_argnames="state")
def go_on(model, state, lengths, knobs, until, stopped_b, top_k):
  """Writes tokens until there are `until`, or every row has ended or been stopped."""
  slots = state["out"].shape[1]
  state = state | {"ended": state["ended"] | stopped_b}

  def unfinished(state):
    return (state["done"] < until) & ~jnp.all(state["ended"])

  def write_one(state):
    # A row whose context is full goes on in its last slot; what it writes there is cut off later.
    positions = jnp.minimum(lengths + state["done"] - 1, slots - 1)[:, None]
    token = jax.lax.dynamic_index_in_dim(state["out"], state["done"] - 1, axis=1)
    batch = Batch(token, positions_bt=positions)
    logits_bv, cache = decode(model, batch, state["cache"].unsqueeze())
    return _drawn(state | {"cache": cache.squeeze()}, logits_bv, knobs, top_k)

  return jax.lax.while_loop(unfinished, write_one, state)
