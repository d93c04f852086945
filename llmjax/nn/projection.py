"""Tensor-parallel projections out of and into the residual stream by a module's weights.

A bias is named like its weight: `query_bias_nh` is of `query_dnh`, `out_bias_d` of `out_nhd`.
"""

from flax import nnx

from llmjax.core.dot import dot
from llmjax.parallel.tensor import column_parallel, row_parallel


def project_in(module: nnx.Module, x_btd, *names: str) -> tuple:
  """Multiplies by weights that contract their first letter, and adds their biases, if any.

  Args:
    module: holds the weights.
    x_btd: residual stream, or a latent in its place.
    names: of weights, such as "query_dnh".
  Returns:
    An array for each name, such as q_btnh.
  """
  letters = {name: name.rsplit("_", 1)[-1] for name in names}
  biases = {name: _bias(name, dims[1:]) for name, dims in letters.items()}
  used = [*names, *(bias for bias in biases.values() if hasattr(module, bias))]

  def project(x_btd, weights):
    results = []
    for name, dims in letters.items():
      y = dot(f"bt{dims[0]},{dims}->bt{dims[1:]}", x_btd, weights[name])
      results.append(_add(y, weights.get(biases[name])))
    return tuple(results)

  outputs = tuple(f"bt{dims[1:]}" for dims in letters.values())
  return column_parallel(project, x_btd, {name: getattr(module, name) for name in used}, outputs)


def project_out(module: nnx.Module, x, name: str):
  """Multiplies by a weight that contracts all but its last letter: y_btd, with its bias, if any."""
  letters = name.rsplit("_", 1)[-1]
  inner = f"bt{letters[:-1]}"
  project = lambda x, weights: dot(f"{inner},{letters}->btd", x, weights[name])  # noqa: E731
  y_btd = row_parallel(project, x, {name: getattr(module, name)}, inner)
  return _add(y_btd, getattr(module, _bias(name, "d"), None))


def _bias(name: str, letters: str) -> str:
  return f"{name.rsplit('_', 1)[0]}_bias_{letters}"


def _add(y, bias):
  return y if bias is None else y + bias.astype(y.dtype)
