"""Projections out of and into the residual stream: Megatron's column- and row-parallel products on
mesh axis `tensor`. By hand, since a compiler sums the gradients of query, key, value, gate and up
one by one; here a half costs one all-gather and one reduce-scatter in each direction."""

import jax
from flax import nnx

from llmjax.core.dot import dot
from llmjax.parallel import rules


def project_in(module: nnx.Module, x_btd, *names: str) -> tuple:
  """Multiplies by weights that contract their first letter, and adds their biases, if any.

  Args:
    module: holds the weights. A bias is named like its weight: `query_bias_nh` is of `query_dnh`,
      `out_bias_d` of `out_nhd`.
    x_btd: residual stream as `shard_stream` lays it out, or a latent in its place.
    names: of weights, such as "query_dnh".
  Returns:
    An array for each name, such as q_btnh, sharded over `tensor`; key and value heads of which
    `tensor` wants copies (`rules.key_copies`) are replicated.
  Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3; with positions cut: Korthikanti et al.
    2022, arXiv:2205.05198, sec. 4.2.
  """
  letters = {name: name.rsplit("_", 1)[-1] for name in names}
  biases = {name: _bias(name, dims[1:]) for name, dims in letters.items()}
  used = [*names, *(bias for bias in biases.values() if hasattr(module, bias))]
  weights = {name: getattr(module, name) for name in used}
  by_hand, cut = _by_hand(x_btd, weights)

  def project(x_btd, weights):
    if cut:
      x_btd = jax.lax.all_gather(x_btd, "tensor", axis=1, tiled=True)
    results = []
    for name, dims in letters.items():
      y = dot(f"bt{dims[0]},{dims}->bt{dims[1:]}", x_btd, weights[name])
      results.append(_add(y, weights.get(biases[name])))
    return tuple(results)

  if not by_hand:
    return project(rules.shard(x_btd, "btd"), weights)
  in_specs = rules.stream_spec(x_btd.shape[1]), rules.weight_specs(weights)
  out_specs = tuple(
    rules.spec(f"bt{dims[1:]}", shape=(*x_btd.shape[:2], *weights[name].shape[1:]))
    for name, dims in letters.items()
  )
  return rules.on_each_device(project, in_specs, out_specs)(x_btd, weights)


def project_out(module: nnx.Module, x, name: str):
  """Multiplies by a weight that contracts all but its last letter: y_btd, with its bias, if any."""
  letters = name.rsplit("_", 1)[-1]
  inner, weights = f"bt{letters[:-1]}", {name: getattr(module, name)}
  by_hand, cut = _by_hand(x, weights)

  def project(x, weights):
    y_btd = dot(f"{inner},{letters}->btd", x, weights[name])
    return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True) if cut else y_btd

  if by_hand:
    in_specs = rules.spec(inner), rules.weight_specs(weights)
    y_btd = rules.on_each_device(project, in_specs, rules.stream_spec(x.shape[1]))(x, weights)
  else:
    y_btd = rules.shard_stream(project(x, weights))
  return _add(y_btd, getattr(module, _bias(name, "d"), None))


def _by_hand(x, weights: dict) -> tuple[bool, bool]:
  """(whether a `shard_map` over all axes is needed, whether `tensor` shards positions in it).

  All axes: where some were the compiler's, it would gather what a reduce-scatter takes over them.
  Where `tensor` does not divide the positions everything is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or rules.inside("tensor"):
    return False, False
  if mesh.shape["tensor"] == 1:
    return rules.has_sharded(weights), False
  even = x.shape[1] % (rules.shards("t") * mesh.shape["tensor"]) == 0
  return even, even


def _bias(name: str, letters: str) -> str:
  return f"{name.rsplit('_', 1)[0]}_bias_{letters}"


def _add(y, bias):
  return y if bias is None else y + bias.astype(y.dtype)
