"""`take_rows`: rows of a table by number, from a weight of any kind."""

import functools

import jax
import jax.numpy as jnp

from llmjax.core.dot import dot
from llmjax.core.weight import Masked, is_kind, summands

_CHUNK = 8192  # rows whose gradients are added up at a time


def take_rows(dtype: str, table, ids):
  """Takes rows by number and casts them; their gradients are added up in the table's dtype.

  Args:
    dtype: of the result.
    table: weight [rows, d] of any kind.
    ids: int32 of any shape, each a row's number.
  Returns:
    [*ids.shape, d].
  """
  terms = []
  for term in summands(table):
    if isinstance(term, tuple):
      factor, (a, b), _ = term
      rows_ta = take_rows(dtype, a, ids.reshape(-1))
      rows = factor * dot("ta,ad->td", rows_ta, b).reshape(*ids.shape, -1)
    elif isinstance(term, Masked):
      rows = take_rows(dtype, term.base, ids) * take_rows(dtype, term.mask, ids)
    elif is_kind(term):  # codes and scales all have the table's rows
      rows = jax.tree.map(lambda array: jnp.take(array, ids, axis=0), term).decode(dtype)
    elif jnp.issubdtype(term.dtype, jnp.inexact):
      rows = _take(dtype, term, ids)
    else:
      rows = jnp.take(term, ids, axis=0).astype(dtype)
    terms.append(rows)
  return functools.reduce(jnp.add, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(dtype: str, table, ids):
  """Gradients go 8,192 rows at a time: a TPU's compiler sorts them by number first, and a program
  that sorts two million at once takes a tenth of a step's compilation."""
  return jnp.take(table, ids, axis=0).astype(dtype)


def _take_forward(dtype, table, ids):
  return _take(dtype, table, ids), (ids, jnp.zeros((len(table), 0), table.dtype))


def _take_backward(dtype, residuals, grad):
  ids, like = residuals
  ids, grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
  chunks = len(ids) // _CHUNK

  def add(total, piece):
    numbers, rows = piece
    return total.at[numbers].add(rows.astype(total.dtype)), None

  total = jnp.zeros((len(like), grad.shape[-1]), like.dtype)
  if chunks:
    cut = lambda a: a[: chunks * _CHUNK].reshape(chunks, _CHUNK, *a.shape[1:])  # noqa: E731
    total, _ = jax.lax.scan(add, total, (cut(ids), cut(grad)))
  if len(ids) % _CHUNK:
    total, _ = add(total, (ids[chunks * _CHUNK :], grad[chunks * _CHUNK :]))
  return total, None


_take.defvjp(_take_forward, _take_backward)
