"""Layers stacked over `l`: the only place that knows how depth is run (scan, unrolled, remat)."""

import jax
import jax.numpy as jnp

_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_layers(blocks, x_btd, cache, *, scan: bool, remat: str, **context):
  """Runs stacked blocks one after another.

  Args:
    blocks: a block whose every leaf has a leading `l`.
    x_btd: residual stream.
    cache: caches with a leading `l`, or None.
    scan: one compiled body for all layers, or a copy of it for each.
    remat: none, full or dots.
    **context: what every layer gets alike.
  Returns:
    (x_btd, caches).
  """

  def body(x_btd, layer):
    block, cache = layer
    return block(x_btd, cache=cache, **context)

  if remat != "none":
    body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=not scan)
  if scan:
    return jax.lax.scan(body, x_btd, (blocks, cache))
  caches = []
  for layer in unstack((blocks, cache)):
    x_btd, new = body(x_btd, layer)
    caches.append(new)
  return x_btd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def unstack(stacked) -> list:
  """Takes a tree apart along its leading axis; the gradient is one concatenation a leaf."""
  leaves, structure = jax.tree.flatten(stacked)
  layers = leaves[0].shape[0]
  columns = [jax.lax.split(leaf, (1,) * layers) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [column[i].squeeze(0) for column in columns])
    for i in range(layers)
  ]
