"""Gradients from their definition: central differences in float64."""

import numpy as np

# The error is step² / 6 times a third derivative, plus 2^-52 / step: with values of order one
# about 1e-9 and 1e-12, both far below fp32's 1e-7.
STEP = 1e-4


def derivative(function, x, direction):
  """How fast a scalar function of an array grows along a direction."""
  x = np.asarray(x, np.float64)
  return (function(x + STEP * direction) - function(x - STEP * direction)) / (2 * STEP)


def gradient(function, x):
  """The gradient of a scalar function, one coordinate after another."""
  grad = np.empty(np.shape(x))
  for place in np.ndindex(grad.shape):
    direction = np.zeros(grad.shape)
    direction[place] = 1
    grad[place] = derivative(function, x, direction)
  return grad


def vjp(function, inputs, grad_out):
  """Pulls a gradient of the output back to every input."""
  inputs = [np.asarray(x, np.float64) for x in inputs]
  grad_out = np.asarray(grad_out, np.float64)

  def pulled(number):
    def scalar(x):
      return np.sum(function(*inputs[:number], x, *inputs[number + 1 :]) * grad_out)

    return gradient(scalar, inputs[number])

  return [pulled(number) for number in range(len(inputs))]


def assert_pulled(mine, function, inputs, grad_out, count=3, **tolerance):
  """Asserts that gradients have the right component along a few random directions each.

  Args:
    mine: dict of gradients by name.
    function: of a dict of float64 arrays, an array.
    inputs: dict of the function's arrays, at least those of `mine`.
    grad_out: gradient of its result.
    count: directions an input; unit vectors, so that a component has the size of one coordinate.
    tolerance: of `assert_allclose`.
  """
  inputs = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
  grad_out = np.asarray(grad_out, np.float64)
  rng = np.random.default_rng(7)
  for name, found in mine.items():
    found = np.asarray(found, np.float64)
    for _ in range(count):
      direction = rng.normal(size=found.shape)
      direction /= np.linalg.norm(direction)

      def scalar(x, name=name):
        return np.sum(function({**inputs, name: x}) * grad_out)

      theirs = derivative(scalar, inputs[name], direction)
      np.testing.assert_allclose(np.sum(found * direction), theirs, err_msg=name, **tolerance)
